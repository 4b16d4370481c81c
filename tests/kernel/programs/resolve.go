// Resolves os.Args[1], connects to its port 80, starts a child process: prints one line for each.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
)

func main() {
	addresses, err := net.LookupIP(os.Args[1])
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for _, address := range addresses {
		if address.To4() != nil {
			fmt.Println("resolved", address)
		}
	}
	var done sync.WaitGroup
	done.Add(1)
	go func() {
		defer done.Done()
		reply, err := http.Get("http://" + os.Args[1] + "/")
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println("connected", reply.Proto, reply.StatusCode)
	}()
	done.Wait()
	output, err := exec.Command("echo", "child").Output()
	fmt.Print(string(output))
	if err != nil {
		fmt.Println(err)
	}
}
