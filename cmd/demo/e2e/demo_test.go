package e2e

import (
	"bufio"
	"context"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/workspaced/workspaced/cmd/internal/lab"
)

// `make run`: the lines that the demo prints work as they are, who ran sudo may
// use the socket, and Ctrl-C leaves nothing.
func TestDemoRun(t *testing.T) {
	if why := missing(); why != "" {
		t.Skip("SKIPPED, NOT TESTED: " + why)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(binDir, "demo"), "run")
	cmd.Env = append(os.Environ(), "SUDO_GID=12345")
	cmd.Stderr = os.Stderr
	// Ended by a kill it would leave its daemon.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	defer func() {
		if !ended {
			cancel()
			_ = cmd.Wait() // the test has failed already
		}
	}()

	out := bufio.NewReader(pipe)
	var printed strings.Builder
	for !strings.Contains(printed.String(), "Ctrl-C stops it") {
		line, err := out.ReadString('\n')
		printed.WriteString(line)
		if err != nil {
			t.Fatalf("%v\n%s", err, &printed)
		}
	}
	var script []string
	for line := range strings.Lines(printed.String()) {
		if regexp.MustCompile(`^  (export|grpcurl|curl|/\S+/demo) `).MatchString(line) && !strings.Contains(line, "WatchWorkspaces") && !strings.Contains(line, "DeleteWorkspace") {
			script = append(script, strings.TrimSpace(line))
		}
	}
	if len(script) < 7 {
		t.Fatalf("%d lines to run in\n%s", len(script), &printed)
	}
	bash := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", strings.Join(script, "\n"))
	bash.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":"+filepath.Dir(grpcurl(t)))
	output, err := bash.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, strings.Join(script, "\n"), output)
	}
	for _, want := range []string{`"API_KEY": "second"`, "WORKSPACE_STATE_RUNNING"} {
		if !strings.Contains(string(output), want) {
			t.Errorf("output has no %s:\n%s", want, output)
		}
	}

	base := regexp.MustCompile(`export SOCK=(\S+)/run/workspaced.sock`).FindStringSubmatch(printed.String())[1]
	for path, want := range map[string]fs.FileMode{".": 0o750, "run": 0o750, "run/workspaced.sock": 0o660} {
		info, err := os.Stat(filepath.Join(base, path))
		if err != nil {
			t.Fatal(err)
		}
		if gid := info.Sys().(*syscall.Stat_t).Gid; gid != 12345 || info.Mode().Perm() != want {
			t.Errorf("%s: group %d, mode %o, want 12345 and %o", path, gid, info.Mode().Perm(), want)
		}
	}

	// The workspace still runs: it has to go too.
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	ended = true
	if err := cmd.Wait(); err != nil {
		t.Errorf("demo run: %v\n%s", err, rest)
	}
	if !strings.Contains(string(rest), "Nothing is left") {
		t.Errorf("it does not say that nothing is left:\n%s", rest)
	}
	leftovers, err := lab.Leftovers(base)
	if err != nil || len(leftovers) > 0 {
		t.Errorf("left behind: %v, %v", leftovers, err)
	}
	if _, err := os.Lstat(base); err == nil {
		t.Errorf("%s is still there", base)
	}
}
