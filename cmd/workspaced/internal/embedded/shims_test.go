package embedded

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// startShim starts what looks like a shim, with a child, in a bundle.
func startShim(t *testing.T, address, bundle string) (exited <-chan struct{}) {
	t.Helper()
	if err := os.MkdirAll(bundle, 0o700); err != nil {
		t.Fatal(err)
	}
	// Not one command, which the shell would become: a parent with a child, which
	// it waits for.
	cmd := exec.Command("/bin/sh", "-c", "sleep 600; true", "shim", "-namespace", "n", "-id", "x", "-address", address)
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
	lost := startShim(t, cfg.Address(), filepath.Join(dir, "lost"))
	known := startShim(t, cfg.Address(), filepath.Join(dir, "known"))
	foreign := startShim(t, "/run/other/containerd.sock", filepath.Join(dir, "foreign"))
	for _, bundle := range []string{"lost", "foreign"} {
		if err := os.Remove(filepath.Join(dir, bundle)); err != nil {
			t.Fatal(err)
		}
	}
	if err := sweepShims(cfg); err != nil {
		t.Fatal(err)
	}
	select {
	case <-lost:
	case <-testContext(t).Done():
		t.Fatal("the lost shim, or its child, lives on")
	}
	for name, exited := range map[string]<-chan struct{}{"known": known, "foreign": foreign} {
		select {
		case <-exited:
			t.Errorf("the %s shim was ended", name)
		default:
		}
	}
}
