// Envserver is the program of the demo's workspace: it tells over HTTP what
// environment it was started with. It listens on a unix socket, which is to lie
// in a volume, so that workspaces don't contend for ports.
//
//	GET /env    {"id": ..., "variables": ..., "env": {"KEY": "value", ...}}
//	GET /files  {"id": ..., "files": {"KEY": "content", ...}}: its secrets' files, now
//	GET /id     the start's identity: another one after every start
//	POST /call/SERVICE/METHOD   calls the daemon, as its workspace's container
//
// For tests its environment makes it do more:
//
//	ENVSERVER_JOURNAL=FILE   add each start and end to a journal
//	ENVSERVER_EXIT=CODE      end at once
//	ENVSERVER_ALLOCATE=any   take memory until the kernel says no
//	ENVSERVER_CRASH=any      let another process crash first, and print whether that
//	                         left a core file; "core": one that asks for a core file
package main

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const defaultSocket = "/demo/env.sock"

func main() {
	if how := os.Getenv(crashingVariable); how != "" {
		abort(how)
	}
	// As process 1 we would not hear these without asking for them.
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT, syscall.SIGUSR1)
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGHUP) // its spec's live_signal, perhaps
	id, environ := rand.Text(), os.Environ()
	journal := os.Getenv("ENVSERVER_JOURNAL")
	if journal != "" {
		if err := enroll(journal, id, variables(environ)); err != nil {
			fail(err)
		}
	}
	if code, err := strconv.Atoi(os.Getenv("ENVSERVER_EXIT")); err == nil {
		os.Exit(code)
	}
	if os.Getenv("ENVSERVER_ALLOCATE") != "" {
		allocate()
	}
	if how := os.Getenv(crashVariable); how != "" {
		fmt.Println("envserver: core file written:", crash(how))
	}
	failed := make(chan error, 1)
	go func() {
		failed <- serve(cmp.Or(os.Getenv("ENVSERVER_SOCKET"), defaultSocket), handler(id, environ))
	}()
	for ended := false; !ended; {
		select {
		case <-changed: // they are read when they are asked for
			fmt.Println("envserver: was told that its files have changed")
		case <-end:
			ended = true
		case err := <-failed:
			fail(err)
		}
	}
	if journal != "" {
		if err := write(journal, entry{ID: id, Time: time.Now(), Ends: true}); err != nil {
			fail(err)
		}
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "envserver:", err)
	os.Exit(1)
}

const (
	crashVariable    = "ENVSERVER_CRASH"
	crashingVariable = "ENVSERVER_CRASHING" // of the process that does
)

// crash starts this program again, lets it crash and tells whether the kernel has
// written a core file. Process 1 could not: it ignores what would end it.
func crash(how string) (core bool) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), crashingVariable+"="+how)
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) {
		fail(fmt.Errorf("the process did not crash: %w", err))
	}
	return cmd.ProcessState.Sys().(syscall.WaitStatus).CoreDump()
}

// abort ends this process as a program does that has met a fault of its own.
func abort(how string) {
	if how == "core" {
		var limit syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_CORE, &limit); err != nil {
			fail(err)
		}
		limit.Cur = limit.Max
		if err := syscall.Setrlimit(syscall.RLIMIT_CORE, &limit); err != nil {
			fail(err)
		}
	}
	signal.Reset()
	debug.SetTraceback("crash")
	panic("told to crash")
}

var memory [][]byte

// allocate takes memory, and uses it, until this process is ended.
func allocate() {
	for {
		memory = append(memory, bytes.Repeat([]byte{1}, 1<<20))
	}
}

func serve(socket string, handler http.Handler) error {
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
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second}
	return server.Serve(l)
}

func variables(environ []string) map[string]string {
	env := make(map[string]string, len(environ))
	for _, kv := range environ {
		key, value, _ := strings.Cut(kv, "=")
		env[key] = value
	}
	return env
}

func handler(id string, environ []string) http.Handler {
	env := variables(environ)
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
	mux.HandleFunc("GET /files", func(w http.ResponseWriter, _ *http.Request) {
		content, err := files()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		out := json.NewEncoder(w)
		out.SetIndent("", "  ")
		_ = out.Encode(struct {
			ID    string            `json:"id"`
			Files map[string]string `json:"files"`
		}{id, content})
	})
	mux.HandleFunc("POST /call/{method...}", handleCall)
	return mux
}

// files reads the files of one moment: all by way of the directory that is in place
// now.
func files() (map[string]string, error) {
	const secrets = "/run/secrets/..data"
	content := make(map[string]string)
	dir, err := os.OpenRoot(secrets)
	if errors.Is(err, fs.ErrNotExist) {
		return content, nil
	} else if err != nil {
		return nil, err
	}
	defer dir.Close()
	entries, err := fs.ReadDir(dir.FS(), ".")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		b, err := dir.ReadFile(e.Name())
		if err != nil {
			return nil, err
		}
		content[e.Name()] = string(b)
	}
	return content, nil
}
