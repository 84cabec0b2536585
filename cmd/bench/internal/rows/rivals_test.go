package rows

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

// withRivals returns an Env whose bench-rivals is a script that gets each request
// in $line.
func withRivals(t *testing.T, script string) *Env {
	t.Helper()
	env := &Env{BinDir: t.TempDir(), Dir: t.TempDir(), Log: t.Output()}
	text := "#!/bin/sh\nwhile read -r line; do\n" + script + "\ndone\n"
	if err := os.WriteFile(filepath.Join(env.BinDir, "bench-rivals"), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return env
}

func start(t *testing.T, env *Env) *rivals {
	t.Helper()
	r, err := env.startRivals(context.WithoutCancel(t.Context())) // Close ends it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(env.Dir); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	})
	return r
}

func TestRivals(t *testing.T) {
	r := start(t, withRivals(t, `case $line in
		*etcd-put*'"clients":2,"connections":1,"ops":4,"size":8'*) echo '{"nanoseconds":2000000000,"latencies":[1000000,2000000,3000000,500000]}';;
		*workqueue-add*'"clients":16,"connections":0,"ops":100'*) echo '{"nanoseconds":2500}';;
		*) echo "{\"error\":\"unknown\"}";;
		esac`))
	latencies, rate, err := r.etcdPut(2, 1, 4, 8)
	if err != nil || rate != 2 {
		t.Errorf("rate %v, %v", rate, err)
	}
	if diff := cmp.Diff(measure.Samples{1, 2, 3, 0.5}, latencies); diff != "" {
		t.Error(diff)
	}
	if ns, err := r.workqueueAdd(16, 100); err != nil || ns != 25 {
		t.Errorf("%v ns, %v", ns, err)
	}
	if _, err := r.workqueueAdd(1, 1); err == nil || !strings.Contains(err.Error(), "unknown") {
		t.Errorf("the rival's error: %v", err)
	}
}

// A rival that is gone is an error of the row, and no hang.
func TestRivalsGone(t *testing.T) {
	r := start(t, withRivals(t, "exit"))
	if _, err := r.workqueueAdd(1, 1); err == nil {
		t.Error("no error from a program that has ended")
	}
	if _, err := (&Env{BinDir: t.TempDir()}).startRivals(t.Context()); err == nil || !strings.Contains(err.Error(), "make bench") {
		t.Errorf("without the program: %v", err)
	}
}
