// Testprog is the program in the test images. What it does is its first
// argument. Once it handles its signals it calls itself "ready".
package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	what := "serve"
	if len(os.Args) > 1 {
		what = os.Args[1]
	}
	switch what {
	case "exit": // CODE
		code, err := strconv.Atoi(os.Args[2])
		if err != nil {
			panic(err)
		}
		os.Exit(code)
	case "attack": // PID MAJOR:MINOR [NAME...]: prints what came of it
		if err := attack(os.Args[2:]); err != nil {
			panic(err)
		}
		return
	case "uid":
		fmt.Println(os.Geteuid())
		return
	case "write": // FILE TEXT
		writeFile(os.Args[2], os.Args[3])
		return
	case "ignore":
		signal.Ignore()
		ready()
		time.Sleep(time.Duration(math.MaxInt64))
	case "env": // prints its environment, serves
		if err := json.NewEncoder(os.Stdout).Encode(os.Environ()); err != nil {
			panic(err)
		}
	case "print": // OUT ERR
		fmt.Println(os.Args[2])
		fmt.Fprintln(os.Stderr, os.Args[3])
		return
	case "lines": // N: prints as many numbered lines of 100 bytes, serves
		n, err := strconv.Atoi(os.Args[2])
		if err != nil {
			panic(err)
		}
		for i := range n {
			fmt.Printf("%099d\n", i)
		}
	case "handled": // exits with 143 on SIGTERM, as a shell does
		terminated := make(chan os.Signal, 1)
		signal.Notify(terminated, syscall.SIGTERM)
		ready()
		<-terminated
		os.Exit(143)
	case "allocate": // until the kernel says no
		for {
			b := make([]byte, 1<<20)
			for i := range b {
				b[i] = byte(i)
			}
			hoard = append(hoard, b)
		}
	case "rotate": // on SIGHUP prints its files, and whether they were ever of two moments
		rotate()
	case "child": // serves, with a child that ignores every signal
		child := exec.Command("/proc/self/exe", "ignore")
		if err := child.Start(); err != nil {
			panic(err)
		}
		fmt.Println("child", child.Process.Pid)
	}
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, syscall.SIGTERM)
	ready()
	<-terminated
}

// rotate reads its files all the time, A and B of which are always the same, and
// prints the present ones at each SIGHUP.
func rotate() {
	const dir = "/run/secrets/..data"
	var torn, reads atomic.Int64
	go func() {
		for {
			root, err := os.OpenRoot(dir)
			if err != nil {
				continue
			}
			a, errA := root.ReadFile("A")
			b, errB := root.ReadFile("B")
			root.Close()
			switch { // an error: they were replaced meanwhile
			case errA == nil && errB == nil && string(a) != string(b):
				torn.Add(1)
			case errA == nil && errB == nil:
				reads.Add(1)
			}
		}
	}()
	hangups := make(chan os.Signal, 1000)
	signal.Notify(hangups, syscall.SIGHUP)
	go func() {
		for range hangups {
			a, err := os.ReadFile("/run/secrets/A")
			if err != nil {
				fmt.Println(err)
			}
			fmt.Printf("pid %d has %s torn %d read %t\n", os.Getpid(), a, torn.Load(), reads.Load() > 0)
		}
	}()
}

var hoard [][]byte

func ready() {
	if err := os.WriteFile("/proc/self/comm", []byte("ready"), 0); err != nil {
		panic(err)
	}
}
