// Resolves argv[2] by getaddrinfo() and by c-ares, connects to its port 80, starts children: one line for each.
const { execFile, fork } = require("child_process");
const dns = require("dns");
const fs = require("fs");
const http = require("http");

if (process.argv[2] === "child") {
  process.send("child");
} else {
  const name = process.argv[2];
  const fail = (error) => {
    console.log(error.message);
    process.exit(1);
  };
  dns.lookup(name, { family: 4 }, (error, address) => {
    if (error) fail(error);
    console.log("resolved", address);
    dns.resolve4(name, (error, [resolved] = []) => {
      if (error || resolved !== address) fail(error || new Error(resolved));
      http.get(`http://${name}/`, (reply) => {
        reply.resume();
        fs.readFile(__filename, (error) => { // by io_uring, where UV_USE_IO_URING=1 asks for it
          if (error) fail(error);
          console.log("connected", `HTTP/${reply.httpVersion}`, reply.statusCode);
          fork(__filename, ["child"]).on("message", (message) => execFile("echo", [message], (error, output) => {
            process.stdout.write(error ? error.message : output);
          }));
        });
      }).on("error", fail);
    });
  });
}
