package embedded

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// needContainerd skips where the machine can't run a private containerd.
func needContainerd(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: a private containerd needs root")
	}
	if _, err := exec.LookPath("containerd"); err != nil {
		t.Skip("SKIPPED, NOT TESTED: no containerd in PATH")
	}
}

func testConfig(t *testing.T) Config {
	dir := t.TempDir()
	return Config{
		Binary:       "containerd",
		Root:         filepath.Join(dir, "root"),
		State:        filepath.Join(dir, "state"),
		LogFile:      filepath.Join(dir, "log", "containerd.log"),
		ReadyTimeout: 20 * time.Second,
	}
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// running returns the pids of cfg's containerds.
func running(t *testing.T, cfg Config) (pids []int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if pid := atoi(e.Name()); pid > 0 && isOurs(pid, cfg.configFile()) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// atoi returns 0 for what is no number.
func atoi(s string) (n int) {
	for _, c := range s {
		if c < '0' || c > '9' {
			return 0
		}
		n = 10*n + int(c-'0')
	}
	return n
}

func TestStartServesAndCloseEndsIt(t *testing.T) {
	needContainerd(t)
	cfg, ctx := testConfig(t), testContext(t)
	c, err := Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !Answers(ctx, c.Address()) {
		t.Error("does not answer after Start")
	}
	pids := running(t, cfg)
	if len(pids) != 1 {
		t.Fatalf("%d containerds run, want 1", len(pids))
	}
	if sid, err := unix.Getsid(pids[0]); err != nil || sid != pids[0] {
		t.Errorf("session of containerd is %d (%v), want its own: %d", sid, err, pids[0])
	}
	c.Close(ctx)
	if got := running(t, cfg); len(got) != 0 {
		t.Errorf("still running after Close: %v", got)
	}
	if Answers(ctx, c.Address()) {
		t.Error("answers after Close")
	}
}

func TestRestartedWhenItDies(t *testing.T) {
	needContainerd(t)
	cfg, ctx := testConfig(t), testContext(t)
	c, err := Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(ctx)
	old := running(t, cfg)[0]
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	poll(t, ctx, "a new containerd", func() bool {
		pids := running(t, cfg)
		return len(pids) == 1 && pids[0] != old && Answers(ctx, c.Address())
	})
	if loops := c.Loops(); len(loops) != 1 || loops[0].Name != LoopName || loops[0].Restarts != 1 || loops[0].Stale {
		t.Errorf("its supervision: %+v", loops)
	}
}

func TestStrayIsReplaced(t *testing.T) {
	needContainerd(t)
	cfg, ctx := testConfig(t), testContext(t)
	if err := prepare(withDefaults(cfg)); err != nil {
		t.Fatal(err)
	}
	// What a killed daemon leaves: a containerd that nobody supervises.
	stray := exec.Command("containerd", "--config", cfg.configFile())
	if err := stray.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = stray.Wait() // it is ended by a signal
	}()
	if err := WaitReady(ctx, cfg.Address()); err != nil {
		t.Fatal(err)
	}
	c, err := Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(ctx)
	select {
	case <-ended:
	case <-ctx.Done():
		t.Fatal("the stray one lives on")
	}
	if got := running(t, cfg); len(got) != 1 {
		t.Errorf("%d containerds run, want 1", len(got))
	}
}

func TestStartFails(t *testing.T) {
	quits := filepath.Join(t.TempDir(), "quits")
	if err := os.WriteFile(quits, []byte("#!/bin/sh\necho broken disk >&2\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	hangs := filepath.Join(t.TempDir(), "hangs")
	if err := os.WriteFile(hangs, []byte("#!/bin/sh\ntrap '' TERM\nwhile :; do read x </dev/zero; done\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		edit func(*Config)
		want string
	}{
		{"no program", func(c *Config) { c.Binary = "no-such-containerd" }, "--containerd-binary"},
		{"ends at once", func(c *Config) { c.Binary = quits }, "broken disk"},
		{"never answers, ignores SIGTERM", func(c *Config) {
			c.Binary, c.ReadyTimeout, c.StopTimeout = hangs, 100*time.Millisecond, 100*time.Millisecond
		}, "no answer"},
		{"path too long", func(c *Config) { c.State = filepath.Join(c.State, strings.Repeat("x", 100)) }, "shorter state_dir"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg, ctx := testConfig(t), testContext(t)
			tt.edit(&cfg)
			began := time.Now()
			c, err := Start(ctx, cfg)
			if err == nil {
				c.Close(ctx)
				t.Fatal("started")
			}
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q: want one line with %q", err, tt.want)
			}
			if d := time.Since(began); d > 15*time.Second {
				t.Errorf("took %v", d)
			}
			if got := running(t, cfg); len(got) != 0 {
				t.Errorf("left running: %v", got)
			}
		})
	}
}

func TestBoundLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	w, err := openLog(path, 100)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.WriteString(strings.Repeat("a", 100) + strings.Repeat("b", 100)); err != nil {
		t.Fatal(err)
	}
	if err := boundLog(path, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString("c"); err != nil {
		t.Fatal(err)
	}
	old, err := os.ReadFile(path + ".1")
	if err != nil || string(old) != strings.Repeat("b", 100) {
		t.Errorf("kept %q (%v), want the last 100 bytes", old, err)
	}
	now, err := os.ReadFile(path)
	if err != nil || string(now) != "c" {
		t.Errorf("log has %q (%v), want what came after, and no hole", now, err)
	}
	if err := boundLog(filepath.Join(t.TempDir(), "none"), 1); err != nil {
		t.Errorf("no log yet: %v", err)
	}
}

func TestChildEnv(t *testing.T) {
	got := childEnv([]string{"PATH=/bin", "NOTIFY_SOCKET=/run/x", "LISTEN_FDS=1", "HOME=/root"})
	if strings.Join(got, " ") != "PATH=/bin HOME=/root" {
		t.Errorf("got %v", got)
	}
}

// poll waits for a state of a real process.
func poll(t *testing.T, ctx context.Context, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("no %s: %v", what, errors.Join(ctx.Err(), context.Cause(ctx)))
		}
	}
}

// Whoever waits in vain is told what is wrong with the socket, not that time
// was up.
func TestWaitReadySaysWhy(t *testing.T) {
	dir := t.TempDir()
	refusing := filepath.Join(dir, "refusing.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: refusing, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	silent := filepath.Join(dir, "silent.sock") // nobody accepts
	if l, err = net.ListenUnix("unix", &net.UnixAddr{Name: silent, Net: "unix"}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for address, want := range map[string]string{
		filepath.Join(dir, "nobody.sock"): "no such file or directory",
		refusing:                          "connection refused",
		silent:                            "something listens there",
	} {
		// Also one that ends in the middle of the first try.
		for _, timeout := range []time.Duration{time.Nanosecond, 50 * time.Millisecond} {
			ctx, cancel := context.WithTimeout(context.Background(), timeout)
			err := WaitReady(ctx, address)
			cancel()
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), address) {
				t.Errorf("after %v: %v, want %q", timeout, err, want)
			}
		}
	}
}
