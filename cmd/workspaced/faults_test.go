package main

import (
	"os/exec"
	"strings"
	"testing"
)

// The fault points' injector is in no release: only the tag brings it in.
func TestFaultsAreInNoRelease(t *testing.T) {
	for tags, want := range map[string]bool{"": false, "faults": true} {
		cmd := exec.CommandContext(t.Context(), "go", "list", "-tags", tags, "-deps", ".")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", cmd, err, out)
		}
		if got := strings.Contains(string(out), "/runtime/runtimetest"); got != want {
			t.Errorf("with the tags %q the daemon reaches runtimetest: %v, want %v", tags, got, want)
		}
	}
}
