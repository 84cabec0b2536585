package main

import (
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// That no core file comes of a real crash, and one does when it may, is part of
// TestContract21_Canary in cmd/demo/e2e.
func TestSetCoreDumps(t *testing.T) {
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &was); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_CORE, &was); err != nil {
			t.Error(err)
		}
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0); err != nil {
			t.Error(err)
		}
	})
	for _, tt := range []struct {
		name     string
		allowed  bool
		limit    unix.Rlimit
		dumpable int
		child    string // what `ulimit -c` says in one
	}{
		{"no", false, unix.Rlimit{Cur: 0, Max: was.Max}, 0, "0"},
		{"after all", true, unix.Rlimit{Cur: was.Max, Max: was.Max}, 1, ""},
		{"no more", false, unix.Rlimit{Cur: 0, Max: was.Max}, 0, "0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := setCoreDumps(tt.allowed); err != nil {
				t.Fatal(err)
			}
			var limit unix.Rlimit
			if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil || limit != tt.limit {
				t.Errorf("limit %+v, %v, want %+v", limit, err, tt.limit)
			}
			dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
			if err != nil || dumpable != tt.dumpable {
				t.Errorf("dumpable %d, %v, want %d", dumpable, err, tt.dumpable)
			}
			out, err := exec.Command("/bin/sh", "-c", "ulimit -c").Output()
			if got := strings.TrimSpace(string(out)); err != nil || tt.child != "" && got != tt.child {
				t.Errorf("a child's limit %q, %v, want %q", got, err, tt.child)
			}
		})
	}
}
