package embedded

import (
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

func TestEndAllEndsItsShimsOnly(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{State: filepath.Join(dir, "state")}
	one := startShim(t, cfg.Address(), "one", filepath.Join(dir, "one"))
	two := startShim(t, cfg.Address(), "two", filepath.Join(dir, "two"))
	foreign := startShim(t, "/run/other/containerd.sock", "foreign", filepath.Join(dir, "foreign"))
	shims, err := EndAll(testContext(t), cfg)
	if err != nil || shims != 2 {
		t.Errorf("ended %d shims, %v, want 2", shims, err)
	}
	mustEnd(t, "first", one)
	mustEnd(t, "second", two)
	select {
	case <-foreign:
		t.Error("another containerd's shim was ended")
	default:
	}
}

func mustEnd(t *testing.T, name string, exited <-chan struct{}) {
	t.Helper()
	select {
	case <-exited:
	case <-testContext(t).Done():
		t.Fatalf("the %s shim, or its child, lives on", name)
	}
}

func TestRemoveBrokenBundles(t *testing.T) {
	cfg := withDefaults(Config{State: filepath.Join(t.TempDir(), "state")})
	bundle := func(id string) string {
		return filepath.Join(cfg.State, "io.containerd.runtime.v2.task", "n", id)
	}
	for _, id := range []string{"broken", "whole"} {
		if err := os.MkdirAll(filepath.Join(bundle(id), "rootfs"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(bundle("whole"), "runtime"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	startShim(t, cfg.Address(), "creating", bundle("creating"))
	if err := removeBrokenBundles(cfg); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]bool{"broken": false, "whole": true, "creating": true} {
		if _, err := os.Stat(bundle(id)); (err == nil) != want {
			t.Errorf("bundle %s is there: %v, want %v", id, err == nil, want)
		}
	}
}
