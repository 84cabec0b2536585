package e2e

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// block is a fenced block of README.md.
type block struct {
	info, text string
	line       int
}

// readBlocks returns the fenced blocks whose language is bash: those that are to
// be run as they are.
func readBlocks(t *testing.T, path string) (blocks []block) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	fence := regexp.MustCompile("(?ms)^```(bash[^\n]*)\n(.*?)^```$")
	for _, m := range fence.FindAllSubmatchIndex(data, -1) {
		blocks = append(blocks, block{
			info: string(data[m[2]:m[3]]),
			text: string(data[m[4]:m[5]]),
			line: 1 + strings.Count(string(data[:m[0]]), "\n"),
		})
	}
	return blocks
}

// README's examples are run exactly as printed, in their order, by bash, with
// the variables set that `make run` prints.
func TestReadmeExamples(t *testing.T) {
	blocks := readBlocks(t, "../../../README.md")
	if len(blocks) < 6 {
		t.Fatalf("README.md has %d blocks to run", len(blocks))
	}
	s := newStage(t, 4*time.Minute)
	tools := filepath.Dir(grpcurl(t))
	env := append(os.Environ(), "SOCK="+s.Daemon.Socket(), "DEMO="+s.VolumeDir, "PATH="+tools+":"+os.Getenv("PATH"))

	// What has to be in the output of the block that has the key.
	expect := map[string][]string{
		"describe":            {"workspace.v1.WorkspaceControl", "rpc SetSecret", `"status": "SERVING"`},
		"/CreateWorkspace":    {`"name": "workspaces/hello"`, `"WORKSPACE_STATE_RUNNING"`},
		"/SetModel":           {`"generation": "3"`, `"observedGeneration": "3"`},
		"http://hello/env":    {`"API_KEY": "second"`, `"MODEL_PROVIDER": "large"`},
		"APPLY_LIVE":          {`"TLS_KEY": "-----BEGIN PRIVATE KEY-----rotated"`},
		"http://hello/files":  {`"TLS_KEY": "-----BEGIN`},
		"/RollBackSecret":     {`"restoredVersion": "1"`, `"API_KEY": "3"`, `"SECRET_VERSION_STATE_DISABLED"`, `"SECRET_VERSION_STATE_DESTROYED"`},
		"/RotateKey":          {`"keyId"`, `"dataKeys"`, `"DATA_KEYS_STATE_`},
		"/BatchUpdateSecrets": {`"key": "USER_TOKEN"`, `"affectedWorkspaces": 1`},
		"/WatchWorkspaces":    {`"name": "workspaces/hello"`, `"synced"`},
		"/DeleteWorkspace":    {`"name": "workspaces/hello"`, "WORKSPACE_STATE_DELETING"},
	}
	found := map[string]bool{}
	for _, b := range blocks {
		t.Run(fmt.Sprintf("line %d", b.line), func(t *testing.T) {
			if strings.Contains(b.text, "curl --silent") {
				if _, err := exec.LookPath("curl"); err != nil {
					t.Skip("SKIPPED, NOT TESTED: there is no curl")
				}
			}
			var want []string
			for key, outputs := range expect {
				if strings.Contains(b.text, key) {
					want, found[key] = append(want, outputs...), true
				}
			}
			ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
			defer cancel()
			out, err := runBlock(ctx, b, env, want)
			if err != nil {
				t.Fatalf("%v\n%s\n%s", err, b.text, out)
			}
			for _, w := range want {
				if !strings.Contains(out, w) {
					t.Errorf("output has no %s:\n%s", w, out)
				}
			}
			if strings.Contains(out, `"first"`) || strings.Contains(out, "t0ken") {
				t.Errorf("a secret's value came back:\n%s", out)
			}
		})
	}
	for key := range expect {
		if !found[key] {
			t.Errorf("no block with %s", key)
		}
	}
	s.gone("hello")
	s.settle(0)
}

// runBlock runs a block to its end; one that watches, until it has printed what
// it has to.
func runBlock(ctx context.Context, b block, env, want []string) (string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// exec: so that Ctrl-C reaches what runs. Only in blocks of one command.
	text := b.text
	watches := strings.Contains(b.info, "watch")
	if watches {
		text = "exec " + text
	}
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", text)
	cmd.Env = env
	if !watches {
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	var out strings.Builder
	lines := bufio.NewScanner(pipe)
	for lines.Scan() {
		out.WriteString(lines.Text() + "\n")
		missing := 0
		for _, w := range want {
			if !strings.Contains(out.String(), w) {
				missing++
			}
		}
		if missing == 0 {
			cancel()
		}
	}
	if err := cmd.Wait(); ctx.Err() == nil {
		return out.String(), fmt.Errorf("the watch ended by itself: %w", err)
	}
	return out.String(), nil
}

// grpcurl returns the operators' tool in the version that tools/ pins.
func grpcurl(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join(binDir, "tools", "grpcurl"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		return path
	}
	path = filepath.Join(scratch(t), "grpcurl")
	cmd := exec.Command("go", "-C", "../../../tools/grpcurl", "build", "-o", path, "github.com/fullstorydev/grpcurl/cmd/grpcurl")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building grpcurl: %v\n%s", err, out)
	}
	return path
}
