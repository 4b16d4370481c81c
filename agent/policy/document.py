"""The YAML format of a policy, as types: what pydantic checks, and what `weir policy schema` prints.

Leaving a key out always means the strictest thing with which an ordinary client still runs.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import NullableSchema, WithDefaultSchema

from agent.policy import globs
from agent.policy.compile import MAX_RULES
from agent.policy.model import MAX_PORT, Action, Bind, Family, Mode, PortRange, Prefix, Protocol, read_destination

API_VERSION = "weir.dev/v1"
KIND = "SocketPolicy"

APP_ENGINE_MOCKED = (
    "SO_KEEPALIVE",
    "SO_DEBUG",
    "TCP_NODELAY",
    "SO_LINGER",
    "SO_OOBINLINE",
    "SO_SNDBUF",
    "SO_RCVBUF",
    "SO_REUSEADDR",
)
"""The options that the App Engine sockets sandbox pretends to have ("Sockets API for legacy bundled services")."""

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""A Kubernetes label (RFC 1123): names go into labels of metrics and pods."""
DNS_NAME = re.compile(r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
PORTS = re.compile(r"[1-9][0-9]{0,4}(-[1-9][0-9]{0,4})?")
DURATION = re.compile(r"[1-9][0-9]{0,5}[smh]")
OPTION = re.compile(r"[A-Z][A-Z0-9]*_[A-Z0-9_]+")
# Kubernetes, "Labels and Selectors": an optional DNS subdomain and a /, then a name of at most 63 characters.
LABEL_KEY = re.compile(
    r"((?=[^/]{1,253}/)[a-z0-9]([a-z0-9-]*[a-z0-9])?([.][a-z0-9]([a-z0-9-]*[a-z0-9])?)*/)?"
    r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
)
NAMESPACE_LETTERS = re.compile(r"[a-z0-9-]")  # RFC 1123, as Kubernetes asks of a namespace
LABEL_VALUE_LETTERS = re.compile(r"[A-Za-z0-9_.-]")

MAX_GLOBS = 64  # in one list of a selector: the agent holds every container against all of them

SECONDS = {"s": 1, "m": 60, "h": 3600}

DEFAULT_NAME = "default"
"""What metrics and events call the policy's default, so that no rule may be called it."""


def read_label(text: str) -> str:
    """Check a policy's or rule's name. Raises ValueError for one that cannot be a label."""
    if not LABEL.fullmatch(text):
        raise ValueError(
            f"{text!r} cannot be a name; write at most 63 lower-case letters, digits and hyphens, such as google-dns"
        )
    return text


def read_rule_name(text: str) -> str:
    """Check a rule's name. Raises ValueError for `default` and for one that cannot be a label."""
    if text == DEFAULT_NAME:
        raise ValueError("'default' is what refusals by spec.default are reported under; give the rule another name")
    return read_label(text)


def read_dns_name(text: str) -> str:
    """Check a destination's DNS name. Raises ValueError for anything that is not one complete name."""
    if not DNS_NAME.fullmatch(text):
        raise ValueError(
            f"{text!r} is no DNS name; write a whole lower-case name such as smtp.gmail.com (no * and no final dot)"
        )
    return text


def read_option(text: str) -> str:
    """Check the form of a socket option's name. Raises ValueError for anything else."""
    if not OPTION.fullmatch(text):
        raise ValueError(f"{text!r} is no socket option; write its name in C, such as SO_KEEPALIVE")
    return text


def read_ports(value: object) -> PortRange:
    """Turn 53 or "8000-8099" into a range. Raises ValueError for anything that is not within 1 to 65535."""
    text = str(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not PORTS.fullmatch(text):
        raise ValueError(f"{text!r} is no port; write a number from 1 to {MAX_PORT}, or a range such as 8000-8099")
    first, _, last = text.partition("-")
    ports = PortRange(int(first), int(last or first))
    if max(ports) > MAX_PORT:
        raise ValueError(f"{text} goes past the last port; write numbers from 1 to {MAX_PORT}")
    if ports.first > ports.last:
        raise ValueError(f"{text} is reversed; write {ports.last}-{ports.first}")
    if ports == (1, MAX_PORT):
        raise ValueError(f"{text} is every port but 0; leave `ports` out, which means every port")
    return ports


def read_duration(value: object) -> int:
    """Turn "90s", "10m" or "1h" into seconds. Raises ValueError for anything else."""
    if not isinstance(value, str) or not DURATION.fullmatch(value):
        raise ValueError(f"{value!r} is no duration; write a number and s, m or h, such as 10m")
    return int(value[:-1]) * SECONDS[value[-1]]


def known_set(name: str, info: ValidationInfo) -> str:
    """Check a set's name against the validation context's `sets`. Raises ValueError for an unknown one."""
    known = (info.context or {}).get("sets", ())
    if name not in known:
        raise ValueError(f"there is no address set {name!r}; the sets are {', '.join(known)}")
    return name


def read_glob(text: str) -> str:
    """Check a glob of a selector. Raises ValueError for an empty one and for a bracket that is wrong."""
    if not text:
        raise ValueError("the text is empty, which matches nothing; write a name, or a glob such as team-*")
    globs.literals(text)
    return text


def read_namespace(text: str) -> str:
    """Check a glob for namespaces. Raises ValueError for one that no namespace can match."""
    return within(NAMESPACE_LETTERS, read_glob(text), "a namespace has lower-case letters, digits and hyphens only")


def read_cgroup(text: str) -> str:
    """Check a glob for paths of cgroups. Raises ValueError for one that no path below the mount can match."""
    read_glob(text)
    if text != text.strip("/") or "//" in text:
        raise ValueError(
            f"{text!r} never matches: paths count from the cgroup2 mount; write one such as system.slice/docker-*, "
            "with no / at either end"
        )
    return text


def read_label_value(text: str) -> str:
    """Check a glob for a label's value; an empty one matches an empty value. Raises ValueError as read_namespace."""
    return within(LABEL_VALUE_LETTERS, text, "a label's value has letters, digits, hyphens, dots and underscores only")


def within(letters: re.Pattern[str], glob: str, rule: str) -> str:
    """Check the characters of a glob that stand for themselves. Raises ValueError for one that nothing can match."""
    strange = next((character for character in globs.literals(glob) if not letters.fullmatch(character)), None)
    if strange is not None:
        raise ValueError(f"{glob!r} never matches because of {strange!r}: {rule}")
    return glob


def read_label_key(text: str) -> str:
    """Check the key of a pod's label. Raises ValueError for one that Kubernetes would not take."""
    if not LABEL_KEY.fullmatch(text):
        raise ValueError(
            f"{text!r} is no key of a Kubernetes label; write one such as app or app.kubernetes.io/name, without globs"
        )
    return text


def kind_of_destination(value: object) -> str | None:
    """Say which of the three forms an item of `to` has; None for none of them."""
    if isinstance(value, str):
        return "address"
    if isinstance(value, dict):
        return next((kind for kind in ("set", "name") if kind in value), None)
    return None


def text_schema(pattern: re.Pattern[str], description: str) -> WithJsonSchema:
    """Return the JSON Schema of text that the pattern describes."""
    return WithJsonSchema({"type": "string", "pattern": f"^({pattern.pattern})$", "description": description})


Label = Annotated[str, AfterValidator(read_label), text_schema(LABEL, "A Kubernetes label.")]
RuleName = Annotated[str, AfterValidator(read_rule_name), text_schema(LABEL, "Unique in the policy; not `default`.")]
DnsName = Annotated[str, AfterValidator(read_dns_name), text_schema(DNS_NAME, "A whole lower-case DNS name.")]
Option = Annotated[str, AfterValidator(read_option), text_schema(OPTION, "A socket option's name in C.")]
Duration = Annotated[int, PlainValidator(read_duration), text_schema(DURATION, "A number and s, m or h.")]
Address = Annotated[
    Prefix,
    PlainValidator(read_destination),
    WithJsonSchema({"type": "string", "description": "An IPv4 or IPv6 address or CIDR prefix, no host bits set."}),
]
Ports = Annotated[
    PortRange,
    PlainValidator(read_ports),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MAX_PORT},
                {"type": "string", "pattern": f"^({PORTS.pattern})$"},
            ],
            "description": "A port, or a range such as 8000-8099.",
        }
    ),
]


def glob_schema(description: str, shortest: int = 1) -> WithJsonSchema:
    """Return the JSON Schema of a glob."""
    return WithJsonSchema({"type": "string", "minLength": shortest, "description": description})


Glob = Annotated[str, AfterValidator(read_glob), glob_schema("A name, or a glob such as team-*.")]
NamespaceGlob = Annotated[str, AfterValidator(read_namespace), glob_schema("A namespace, or a glob such as team-*.")]
CgroupGlob = Annotated[str, AfterValidator(read_cgroup), glob_schema("A path below the cgroup2 mount; * goes past /.")]
LabelGlob = Annotated[str, AfterValidator(read_label_value), glob_schema("A label's value, or a glob.", 0)]
LabelKey = Annotated[str, AfterValidator(read_label_key), text_schema(LABEL_KEY, "The key of a pod's label.")]


class Part(BaseModel):
    """A mapping of the file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SetDestination(Part):
    """The addresses of a named set (policies/sets, and `resolvers`: the host's DNS servers)."""

    set_name: Annotated[str, AfterValidator(known_set)] = Field(alias="set")


class NameDestination(Part):
    """The addresses behind a DNS name. Read and judged by `weir policy explain`; not yet in force in the kernel."""

    dns_name: DnsName = Field(alias="name")


DestinationItem = Annotated[
    Annotated[Address, Tag("address")]
    | Annotated[SetDestination, Tag("set")]
    | Annotated[NameDestination, Tag("name")],
    Discriminator(kind_of_destination),
]


class RulePart(Part):
    """One rule. It matches when all that it lists match; what it leaves out matches everything."""

    name: RuleName
    action: Action
    to: tuple[DestinationItem, ...] = Field(default=(), min_length=1, description="Any one of these destinations.")
    ports: tuple[Ports, ...] = Field(default=(), min_length=1, description="Any one of these ports.")
    protocol: Protocol | None = Field(default=None, description="Only this protocol.")


class OptionsPart(Part):
    """Socket options. Reading SO_ERROR and SO_TYPE always works. Not yet in force."""

    mock: tuple[Option, ...] = Field(
        default=APP_ENGINE_MOCKED, description="Getting gives a constant, setting is ignored."
    )
    others: Action = Field(default=Action.DENY, description="What happens to every other option.")


class SocketsPart(Part):
    """What a program may do with sockets, wherever they lead."""

    families: tuple[Family, ...] = Field(
        default=(Family.INET, Family.INET6, Family.UNIX),
        min_length=1,
        description="Every other is refused at socket().",
    )
    protocols: tuple[Protocol, ...] = Field(
        default=(Protocol.TCP, Protocol.UDP), min_length=1, description="Every other is refused at socket()."
    )
    listen: Action = Field(default=Action.DENY, description="Accepting connections from others.")
    bind: Bind = Field(default=Bind.DENY, description="ephemeral: only port 0 on a wildcard or loopback address.")
    transfer: Action = Field(default=Action.DENY, description="Using a socket that another container made.")
    idle_timeout: Duration | None = Field(
        default=None, alias="idleTimeout", description="Reclaim a socket after this long without use. Not yet in force."
    )
    options: OptionsPart = Field(default_factory=OptionsPart)


class SelectorPart(Part):
    """Which containers of a node get this policy: those that match every key given. At least one key."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={"minProperties": 1})

    namespaces: tuple[NamespaceGlob, ...] = Field(
        default=(), min_length=1, max_length=MAX_GLOBS, description="Any one of these namespaces."
    )
    pod_labels: dict[LabelKey, LabelGlob] = Field(
        default_factory=dict,
        alias="podLabels",
        min_length=1,
        max_length=MAX_GLOBS,
        description="All of these labels, each with a value that the glob matches.",
        json_schema_extra={"additionalProperties": False},  # pydantic makes the key's pattern a patternProperty
    )
    containers: tuple[Glob, ...] = Field(
        default=(), min_length=1, max_length=MAX_GLOBS, description="Any one of these names of a container in its pod."
    )
    cgroups: tuple[CgroupGlob, ...] = Field(
        default=(), min_length=1, max_length=MAX_GLOBS, description="Any one of these cgroups."
    )

    @model_validator(mode="after")
    def _not_empty(self) -> "SelectorPart":
        if not self.model_fields_set:
            raise ValueError(
                "the selector is empty; give it namespaces, podLabels, containers or cgroups, or take the key out"
            )
        return self


class SpecPart(Part):
    """What the policy says."""

    selector: SelectorPart | None = Field(
        default=None, description="Which containers get it from `weir agent`, unless their pod's annotation names one."
    )
    mode: Mode = Field(default=Mode.ENFORCE, description="audit: count and report, refuse nothing.")
    sockets: SocketsPart = Field(default_factory=SocketsPart)
    egress: tuple[RulePart, ...] = Field(
        default=(), min_length=1, max_length=MAX_RULES, description="Rules in order; the first that matches decides."
    )
    default: Action = Field(default=Action.DENY, description="For a destination that no rule matches.")


class MetadataPart(Part):
    """What the policy is called."""

    name: Label


class Document(Part):
    """A weir socket policy."""

    api_version: Literal["weir.dev/v1"] = Field(alias="apiVersion")
    kind: Literal["SocketPolicy"]
    metadata: MetadataPart
    spec: SpecPart


class SchemaWithoutNull(GenerateJsonSchema):
    """None is how this code says that a key is absent; in a file, a key without a value is an error."""

    def nullable_schema(self, schema: NullableSchema) -> JsonSchemaValue:
        """Return the schema of the value itself."""
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: WithDefaultSchema) -> JsonSchemaValue:
        """Return the schema without a default that no file could write."""
        if schema.get("default", ...) in (None, ()):
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a policy file."""
    return {
        "$schema": SchemaWithoutNull.schema_dialect,
        **Document.model_json_schema(schema_generator=SchemaWithoutNull),
    }
