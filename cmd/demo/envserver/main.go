// Envserver is the program of the demo's workspace: it tells over HTTP what
// environment it was started with. It listens on a unix socket, which is to lie
// in a volume, so that workspaces don't contend for ports.
//
//	GET /env  {"id": ..., "variables": ..., "env": {"KEY": "value", ...}}
//	GET /id   the start's identity: another one after every start
package main

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

const defaultSocket = "/demo/env.sock"

func main() {
	// As process 1 we would not hear these without asking for them.
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	failed := make(chan error, 1)
	go func() { failed <- serve(cmp.Or(os.Getenv("ENVSERVER_SOCKET"), defaultSocket)) }()
	select {
	case <-end:
	case err := <-failed:
		fmt.Fprintln(os.Stderr, "envserver:", err)
		os.Exit(1)
	}
}

func serve(socket string) error {
	// The socket of the container before lies there still: ours replaces it in
	// one step.
	mine := fmt.Sprintf("%s.%d", socket, time.Now().UnixNano())
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: mine, Net: "unix"})
	if err != nil {
		return err
	}
	if err := os.Chmod(mine, 0o666); err != nil {
		return err
	}
	if err := os.Rename(mine, socket); err != nil {
		return err
	}
	fmt.Println("envserver: serving on", socket)
	server := &http.Server{Handler: handler(rand.Text(), os.Environ()), ReadHeaderTimeout: 5 * time.Second}
	return server.Serve(l)
}

func handler(id string, environ []string) http.Handler {
	env := make(map[string]string, len(environ))
	for _, kv := range environ {
		key, value, _ := strings.Cut(kv, "=")
		env[key] = value
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /id", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, id)
	})
	mux.HandleFunc("GET /env", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		out := json.NewEncoder(w)
		out.SetIndent("", "  ")
		_ = out.Encode(struct {
			ID        string            `json:"id"`
			Variables int               `json:"variables"`
			Env       map[string]string `json:"env"`
		}{id, len(environ), env})
	})
	return mux
}
