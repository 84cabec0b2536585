package rows

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"time"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

// rivals is the program in cmd/bench/rivals, which has what must not enter our
// go.mod. Its methods are for one goroutine at a time.
type rivals struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	answers *bufio.Reader
	cancel  context.CancelFunc
	clean   func() error
}

// rivalRequest and rivalAnswer are Request and Answer of cmd/bench/rivals.
type rivalRequest struct {
	Run         string `json:"run"`
	Clients     int    `json:"clients"`
	Connections int    `json:"connections"`
	Ops         int    `json:"ops"`
	Size        int    `json:"size"`
}

type rivalAnswer struct {
	Error       string  `json:"error"`
	Nanoseconds int64   `json:"nanoseconds"`
	Latencies   []int64 `json:"latencies"`
}

// startRivals starts the program, which ends with Close or ctx.
func (e *Env) startRivals(ctx context.Context) (_ *rivals, err error) {
	path, err := e.program("bench-rivals")
	if err != nil {
		return nil, err
	}
	dir, clean, err := e.temp("rivals")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &rivals{cmd: exec.CommandContext(ctx, path, dir), cancel: cancel, clean: clean}
	r.cmd.Stderr = e.Log
	r.cmd.WaitDelay = 10 * time.Second
	defer func() {
		if err != nil {
			cancel()
			err = errors.Join(err, clean())
		}
	}()
	if r.in, err = r.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	r.answers = bufio.NewReader(out)
	return r, r.cmd.Start()
}

// Close ends the program and removes its files.
func (r *rivals) Close() error {
	defer r.cancel()
	return errors.Join(r.in.Close(), r.cmd.Wait(), r.clean())
}

func (r *rivals) run(req rivalRequest) (a rivalAnswer, err error) {
	line, err := json.Marshal(req)
	if err != nil {
		return a, err
	}
	if _, err := r.in.Write(append(line, '\n')); err != nil {
		return a, fmt.Errorf("rival %s: %w", req.Run, err)
	}
	if line, err = r.answers.ReadBytes('\n'); err != nil {
		return a, fmt.Errorf("rival %s: %w", req.Run, err)
	}
	if err := json.Unmarshal(line, &a); err != nil {
		return a, fmt.Errorf("rival %s: %w", req.Run, err)
	}
	if a.Error != "" {
		return a, fmt.Errorf("rival %s: %s", req.Run, a.Error)
	}
	return a, nil
}

// etcdPut has so many clients put values of size bytes, ops in all, into an
// embedded etcd server of one member, by so many connections over a unix socket. It
// returns each put's latency in ms and how many were acknowledged a second.
func (r *rivals) etcdPut(clients, connections, ops, size int) (latencies measure.Samples, perSecond float64, err error) {
	a, err := r.run(rivalRequest{Run: "etcd-put", Clients: clients, Connections: connections, Ops: ops, Size: size})
	for _, l := range a.Latencies {
		latencies.Add(time.Duration(l), time.Millisecond)
	}
	return latencies, float64(ops) / (float64(a.Nanoseconds) / 1e9), err
}

// workqueueAdd has so many goroutines add a key that waits already to a workqueue
// of client-go, ops times in all, and returns how long one took, in ns of the
// whole run.
func (r *rivals) workqueueAdd(goroutines, ops int) (nanoseconds float64, err error) {
	a, err := r.run(rivalRequest{Run: "workqueue-add", Clients: goroutines, Ops: ops})
	return float64(a.Nanoseconds) / float64(ops), err
}
