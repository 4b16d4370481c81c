/* What the kernel charges anyone: programs that do nothing, on every hook that weir uses. */
int weir_sock_create(struct bpf_sock *ctx) { return 1; }
int weir_sock_release(struct bpf_sock *ctx) { return 1; }
int weir_connect4(struct bpf_sock_addr *ctx) { return 1; }
int weir_connect6(struct bpf_sock_addr *ctx) { return 1; }
int weir_sendmsg4(struct bpf_sock_addr *ctx) { return 1; }
int weir_sendmsg6(struct bpf_sock_addr *ctx) { return 1; }
int weir_bind4(struct bpf_sock_addr *ctx) { return 1; }
int weir_bind6(struct bpf_sock_addr *ctx) { return 1; }
int weir_egress(struct __sk_buff *skb) { return 1; }
int weir_ingress(struct __sk_buff *skb) { return 1; }
