// Bench-rivals runs what workspaced is measured beside and what must not enter
// its go.mod: an embedded etcd and client-go's workqueue. It reads one request a
// line from its input, JSON as in Request, runs it, and answers in one line, JSON
// as in Answer. It ends with its input.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

// Request asks for one run.
type Request struct {
	// Run is "etcd-put" or "workqueue-add".
	Run string `json:"run"`
	// Clients or goroutines that run at once.
	Clients int `json:"clients"`
	// Connections is how many clients of etcd have, together.
	Connections int `json:"connections"`
	// Ops is how many operations all of them do together.
	Ops int `json:"ops"`
	// Size of a value that is put, in bytes.
	Size int `json:"size"`
}

// Answer is what a run has measured.
type Answer struct {
	// Error is empty after a run that succeeded.
	Error string `json:"error,omitempty"`
	// Nanoseconds of all of the run.
	Nanoseconds int64 `json:"nanoseconds"`
	// Latencies are those of each operation, in nanoseconds; empty where an
	// operation takes less than reading the clock does.
	Latencies []int64 `json:"latencies,omitempty"`
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: bench-rivals DIRECTORY, which is empty and may be written to")
		os.Exit(2)
	}
	if err := serve(context.Background(), os.Args[1], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench-rivals:", err)
		os.Exit(1)
	}
}

func serve(ctx context.Context, dir string, in io.Reader, out io.Writer) (err error) {
	r := &rivals{dir: dir}
	defer func() { err = errors.Join(err, r.close()) }()
	answers := json.NewEncoder(out)
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var req Request
		if err := json.Unmarshal(lines.Bytes(), &req); err != nil {
			return fmt.Errorf("request: %w", err)
		}
		answer, err := r.run(ctx, &req)
		if err != nil {
			answer = Answer{Error: err.Error()}
		}
		if err := answers.Encode(answer); err != nil {
			return err
		}
	}
	return lines.Err()
}

type rivals struct {
	dir  string
	etcd *etcd
}

func (r *rivals) run(ctx context.Context, req *Request) (Answer, error) {
	if req.Clients < 1 || req.Ops < req.Clients {
		return Answer{}, fmt.Errorf("%d operations of %d clients", req.Ops, req.Clients)
	}
	switch req.Run {
	case "etcd-put":
		if r.etcd == nil {
			var err error
			if r.etcd, err = startEtcd(ctx, r.dir); err != nil {
				return Answer{}, err
			}
		}
		return r.etcd.put(ctx, req)
	case "workqueue-add":
		return workqueueAdd(req), nil
	default:
		return Answer{}, fmt.Errorf("there is no run %q", req.Run)
	}
}

func (r *rivals) close() error {
	if r.etcd == nil {
		return nil
	}
	return r.etcd.close()
}
