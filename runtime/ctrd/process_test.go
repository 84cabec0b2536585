package ctrd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
)

const leaderless = "CTRD_TEST_LEADERLESS"

// As a child it ends its first thread, and lives on until its standard input ends.
func init() {
	if os.Getenv(leaderless) == "" {
		return
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	_, _, _ = unix.Syscall(unix.SYS_EXIT, 0, 0, 0) // of this thread, and init has the first one
}

// child starts a process that ends when the test closes the pipe.
func child(t *testing.T, env string, command ...string) (pid int, end func()) {
	t.Helper()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env = append(os.Environ(), env)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid, func() { _ = in.Close() }
}

func open(t *testing.T, pid int) *process {
	t.Helper()
	start, err := startTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	p, err := openProcess(pid, start)
	if err != nil || p == nil {
		t.Fatalf("process %d: %v, %v", pid, p, err)
	}
	t.Cleanup(p.close)
	return p
}

// What runs is known by its other threads when the first one has ended.
func TestExecutableWithoutFirstThread(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	want, err := identify(self)
	if err != nil {
		t.Fatal(err)
	}
	pid, end := child(t, leaderless+"=1", self)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for poll := time.NewTicker(time.Millisecond); ; {
		if _, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); errors.Is(err, os.ErrNotExist) {
			break
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			t.Fatal("the first thread does not end")
		}
	}
	if got, err := executableOf(pid); err != nil || got != want {
		t.Errorf("it runs %+v, %v, want %+v", got, err, want)
	}
	p := open(t, pid)
	rec := &record{PID: pid, Init: want, Launch: &launchRecord{Generation: 1}}
	rec.Init.Ino++
	if phase, err := unit().livePhase(t.Context(), rec, p); phase != runtime.PhaseRunning || err != nil {
		t.Errorf("it is %v, %v", phase, err)
	}
	end()
	if err := p.wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := executableOf(pid); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("ended, it runs %+v, %v", got, err)
	}
}

// Promise 15: an init whose daemon died before the go-ahead ends. While it is at
// it, it is not taken for the command: nobody would have been told the truth about
// the generation that is observed.
func TestContract15_EndingIsNotRunning(t *testing.T) {
	// A process between the loss of its memory and its end, for as long as the test
	// wants: one that nobody has reaped, with the pidfd of one that lives.
	dead, end := child(t, "", "cat")
	pid, letGo := child(t, "", "cat")
	ended, p := open(t, dead), open(t, pid)
	end()
	if err := ended.wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	rec := &record{PID: dead, Launch: &launchRecord{Generation: 1}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if phase, err := unit().livePhase(ctx, rec, p); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("it is %v, %v", phase, err)
	}
	letGo()
	if phase, err := unit().livePhase(t.Context(), rec, p); phase != runtime.PhaseExited || err != nil {
		t.Errorf("in the end it is %v, %v", phase, err)
	}
}

// Should the one that waits for all ends give up, none is missed in silence: each
// watcher is told to look, and can't watch again.
func TestContract13_AbandonedWatches(t *testing.T) {
	pid, _ := child(t, "", "cat")
	told := make(chan *watch, 1)
	ws, err := newWatches(func(w *watch) { told <- w })
	if err != nil {
		t.Fatal(err)
	}
	w := &watch{id: "a", process: open(t, pid)}
	if err := ws.add(w); err != nil {
		t.Fatal(err)
	}
	if err := ws.epoll.Close(); err != nil {
		t.Fatal(err)
	}
	if got := <-told; got != w {
		t.Errorf("told of %+v", got)
	}
	ws.remove(w)
	if err := ws.add(&watch{id: "a", process: open(t, pid)}); !errors.Is(err, errWatchesClosed) {
		t.Errorf("watching again: %v", err)
	}
	ws.close()
}
