package embedded

import (
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// startShim starts what looks like a shim, with a child, in a bundle.
func startShim(t *testing.T, address, id, bundle string) (exited <-chan struct{}) {
	t.Helper()
	if err := os.MkdirAll(bundle, 0o700); err != nil {
		t.Fatal(err)
	}
	// Not one command, which the shell would become: a parent with a child, which
	// it waits for.
	cmd := exec.Command("/bin/sh", "-c", "sleep 600; true", "shim", "-namespace", "n", "-id", id, "-address", address)
	cmd.Dir = bundle
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Ends when parent and child, who share it, have ended.
		_, _ = out.Read(make([]byte, 1))
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		for _, p := range descendants(mustRead(t), cmd.Process.Pid) {
			_ = killProcess(p, mustRead(t)[p])
		}
		_ = cmd.Process.Kill()
		<-done
	})
	poll(t, testContext(t), "child", func() bool { return len(descendants(mustRead(t), cmd.Process.Pid)) == 1 })
	return done
}

func mustRead(t *testing.T) map[int]proc {
	all, err := readProcesses()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestSweepEndsLostShimsOnly(t *testing.T) {
	dir := t.TempDir()
	cfg := withDefaults(Config{State: filepath.Join(dir, "state")})
	begin := func(name, address string) (exited <-chan struct{}) {
		return startShim(t, address, name, filepath.Join(dir, name))
	}
	deleted := begin("deleted", cfg.Address())
	broken := begin("broken", cfg.Address())
	known := begin("known", cfg.Address())
	unknown := begin("unknown", cfg.Address())
	foreign := begin("foreign", "/run/other/containerd.sock")
	for _, bundle := range []string{"deleted", "foreign"} {
		if err := os.Remove(filepath.Join(dir, bundle)); err != nil {
			t.Fatal(err)
		}
	}
	// What containerd says of them.
	silent := errors.New("no answer")
	hasTask := func(namespace, id string) (bool, error) {
		if namespace != "n" || id == "deleted" || id == "foreign" {
			t.Errorf("asked about %s of %s", id, namespace)
		}
		if id == "unknown" {
			return false, silent
		}
		return id == "known", nil
	}

	// A containerd that was started before all of them: it may be about to create
	// a task.
	if err := sweepShims(cfg, 1, hasTask); err != nil {
		t.Fatal(err)
	}
	mustEnd(t, "deleted", deleted)
	mustRun(t, map[string]<-chan struct{}{"broken": broken, "known": known, "unknown": unknown, "foreign": foreign})

	// One that was started after them.
	if err := sweepShims(cfg, math.MaxUint64, nil); err != nil {
		t.Fatal(err)
	}
	mustRun(t, map[string]<-chan struct{}{"broken": broken, "known": known, "unknown": unknown, "foreign": foreign})
	if err := sweepShims(cfg, math.MaxUint64, hasTask); !errors.Is(err, silent) {
		t.Errorf("error %v, want %v", err, silent)
	}
	mustEnd(t, "broken", broken)
	mustRun(t, map[string]<-chan struct{}{"known": known, "unknown": unknown, "foreign": foreign})
}

func mustEnd(t *testing.T, name string, exited <-chan struct{}) {
	t.Helper()
	select {
	case <-exited:
	case <-testContext(t).Done():
		t.Fatalf("the %s shim, or its child, lives on", name)
	}
}

func mustRun(t *testing.T, shims map[string]<-chan struct{}) {
	t.Helper()
	for name, exited := range shims {
		select {
		case <-exited:
			t.Errorf("the %s shim was ended", name)
		default:
		}
	}
}
