package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// The test binary is workspace-init, until that becomes a standby, when these name
// the directory of its FIFOs and the program.
const (
	initDir     = "WORKSPACE_INIT_TEST_DIR"
	initProgram = "WORKSPACE_INIT_TEST_PROGRAM"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(initDir); dir != "" {
		program := os.Getenv(initProgram)
		os.Unsetenv(initDir)
		os.Unsetenv(initProgram)
		os.Exit(run(dir, append([]string{program}, os.Args[1:]...)))
	}
	os.Exit(m.Run())
}

var built struct {
	sync.Mutex
	program []byte
}

// program returns the path of the real program, as make builds it.
func program(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("WORKSPACED_BIN_DIR"); dir != "" {
		return filepath.Join(dir, "workspace-init")
	}
	path := filepath.Join(t.TempDir(), "workspace-init")
	built.Lock()
	defer built.Unlock()
	if built.program != nil {
		if err := os.WriteFile(path, built.program, 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-ldflags=-E=workspace_init_entry", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var err error
	if built.program, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	return path
}

// child is a workspace-init with a daemon's ends of its FIFOs.
type child struct {
	argv            []string // the command
	cmd             *exec.Cmd
	out, errors     bytes.Buffer
	goAhead, result *os.File
}

const patience = 20 * time.Second

func start(t *testing.T, workingDir, formats string, argv ...string) *child {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{handshake.GoAheadName, handshake.ResultName} {
		if err := syscall.Mkfifo(filepath.Join(dir, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open := func(name string, mode int) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, name), mode|syscall.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	c := &child{argv: argv, goAhead: open(handshake.GoAheadName, os.O_RDWR), result: open(handshake.ResultName, os.O_RDWR)}
	if err := c.result.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	c.cmd = exec.CommandContext(ctx, os.Args[0], workingDir, formats, argv[0])
	c.cmd.Env = []string{initDir + "=" + dir, initProgram + "=" + program(t), "PATH=" + os.Getenv("PATH"), "HOME=/from/passwd"}
	c.cmd.Stdout, c.cmd.Stderr = &c.out, &c.errors
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *child) want(t *testing.T, kind handshake.Kind, cause handshake.Cause) handshake.Result {
	t.Helper()
	res, err := handshake.ReadResult(c.result)
	if err != nil || res.Kind != kind || res.Cause != cause {
		t.Fatalf("result = %+v, %v, want kind %d, cause %d", res, err, kind, cause)
	}
	return res
}

// send sends the go-ahead.
func (c *child) send(t *testing.T, env ...string) {
	t.Helper()
	if err := handshake.WriteGoAhead(c.goAhead, handshake.GoAhead{Argv: c.argv, Env: env}); err != nil {
		t.Fatal(err)
	}
}

func (c *child) wantExit(t *testing.T, code int) {
	t.Helper()
	err := c.cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = nil
	}
	if err != nil || c.cmd.ProcessState.ExitCode() != code {
		t.Errorf("init ended with %v, %v, want code %d\n%s%s", c.cmd.ProcessState, err, code, &c.out, &c.errors)
	}
}

func TestBecomesTheCommand(t *testing.T) {
	work := t.TempDir()
	c := start(t, work, "own", "sh", "-c", `echo "$0 $1 $$"; pwd; env; exit 7`, "zero", "one two")
	c.want(t, handshake.Ready, handshake.CauseNone)
	env := []string{"PATH=" + os.Getenv("PATH"), "SECRET=value with = and spaces"}
	c.send(t, env...)
	c.want(t, handshake.Executing, handshake.CauseNone)
	c.wantExit(t, 7)
	lines := strings.Split(strings.TrimSpace(c.out.String()), "\n")
	for _, want := range slices.Concat(env, []string{work, "HOME=/from/passwd"}) {
		if !slices.Contains(lines, want) {
			t.Errorf("output lacks %q:\n%s", want, &c.out)
		}
	}
	if !strings.HasPrefix(lines[0], "zero one two ") {
		t.Errorf("arguments: %q", lines[0])
	}
}

func TestSentHomeWins(t *testing.T) {
	c := start(t, "/", "own", "/bin/sh", "-c", `echo "home=$HOME"`)
	c.want(t, handshake.Ready, handshake.CauseNone)
	c.send(t, "HOME=")
	c.wantExit(t, 0)
	if got := strings.TrimSpace(c.out.String()); got != "home=" {
		t.Errorf("output %q", got)
	}
}

func TestOneStreamOfOutput(t *testing.T) {
	c := start(t, "/", "own", "/bin/sh", "-c", `echo 1; echo 2 >&2; echo 3; exec >&-; echo 4 >&2`)
	c.want(t, handshake.Ready, handshake.CauseNone)
	c.send(t)
	c.wantExit(t, 0)
	if got := c.out.String(); got != "1\n2\n3\n4\n" {
		t.Errorf("output %q, errors %q", got, &c.errors)
	}
}

// A standby never outlives its daemon, and never starts by accident.
func TestEndsWithItsDaemon(t *testing.T) {
	var whole bytes.Buffer
	if err := handshake.WriteGoAhead(&whole, handshake.GoAhead{Argv: []string{"/bin/sh", "-c", "echo started"}, Env: []string{"SECRET=value"}}); err != nil {
		t.Fatal(err)
	}
	for name, sent := range map[string][]byte{
		"before anything was sent": nil,
		"in the header":            whole.Bytes()[:10],
		"one byte from the end":    whole.Bytes()[:whole.Len()-1],
	} {
		t.Run(name, func(t *testing.T) {
			c := start(t, "/", "own", "/bin/sh", "-c", "echo started")
			c.want(t, handshake.Ready, handshake.CauseNone)
			if _, err := c.goAhead.Write(sent); err != nil {
				t.Fatal(err)
			}
			c.goAhead.Close()
			c.wantExit(t, handshake.ExitNoDaemon)
			if c.out.Len() != 0 {
				t.Errorf("output: %s", &c.out)
			}
		})
	}
	t.Run("before init looked", func(t *testing.T) {
		dir := t.TempDir()
		for _, name := range []string{handshake.GoAheadName, handshake.ResultName} {
			if err := syscall.Mkfifo(filepath.Join(dir, name), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if code := run(dir, []string{"init", "/", "own", "/bin/sh"}); code != handshake.ExitNoDaemon {
			t.Errorf("code %d", code)
		}
	})
}

func TestRefusesWhatIsNoGoAhead(t *testing.T) {
	c := start(t, "/", "own", "/bin/sh", "-c", "echo started")
	c.want(t, handshake.Ready, handshake.CauseNone)
	if _, err := io.WriteString(c.goAhead, strings.Repeat("garbage ", 20)); err != nil {
		t.Fatal(err)
	}
	c.wantExit(t, handshake.ExitNoDaemon)
	if c.out.Len() != 0 {
		t.Errorf("output: %s", &c.out)
	}
}

func TestSaysWhyExecFailed(t *testing.T) {
	// It goes away between the check and the go-ahead.
	file := filepath.Join(t.TempDir(), "command")
	if err := os.WriteFile(file, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	c := start(t, "/", "own", file)
	c.want(t, handshake.Ready, handshake.CauseNone)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	c.send(t)
	c.want(t, handshake.Failed, handshake.CauseExec)
	if res := c.want(t, handshake.Failed, handshake.CauseNotFound); syscall.Errno(res.Errno) != syscall.ENOENT {
		t.Errorf("result %+v", res)
	}
	c.wantExit(t, handshake.ExitRefused)

	// execve alone can tell this one: it is a program file, and none to execute.
	file = filepath.Join(t.TempDir(), "object")
	if err := os.WriteFile(file, elf(machines[runtime.GOARCH][0], 1, ""), 0o755); err != nil {
		t.Fatal(err)
	}
	c = start(t, "/", "own", file)
	c.want(t, handshake.Ready, handshake.CauseNone)
	c.send(t, "SECRET=canary")
	c.want(t, handshake.Executing, handshake.CauseNone)
	c.want(t, handshake.Failed, handshake.CauseExec)
	if res := c.want(t, handshake.Failed, handshake.CauseFormat); strings.Contains(res.Message, "canary") {
		t.Errorf("result %+v", res)
	}
	c.wantExit(t, handshake.ExitRefused)
}

// elf is the start of a 64-bit program file.
func elf(machine, kind uint16, loader string) []byte {
	b := make([]byte, 64+56)
	copy(b, "\x7fELF\x02\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(b[16:], kind)
	le.PutUint16(b[18:], machine)
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[32:], 64)
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	if loader == "" {
		return b
	}
	le.PutUint16(b[56:], 1)
	le.PutUint32(b[64:], 3)
	le.PutUint64(b[64+8:], 64+56)
	le.PutUint64(b[64+32:], uint64(len(loader)+1))
	return append(append(b, loader...), 0)
}

func TestChecks(t *testing.T) {
	dir := t.TempDir()
	ours := machines[runtime.GOARCH][0]
	const notOurs = 8 // EM_MIPS
	file := func(name string, mode os.FileMode, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file("static", 0o755, elf(ours, 2, ""))
	file("dynamic", 0o755, elf(ours, 2, filepath.Join(dir, "static")))
	file("loaderless", 0o755, elf(ours, 2, "/no/such/loader"))
	file("foreign", 0o755, elf(notOurs, 2, ""))
	file("script", 0o755, []byte("#!"+filepath.Join(dir, "static")+" -x\n"))
	file("lost", 0o755, []byte("#! /no/such/shell\n"))
	file("nameless", 0o755, []byte("#! \n"))
	file("text", 0o755, []byte("echo"))
	file("empty", 0o755, nil)
	file("plain", 0o644, elf(ours, 2, ""))
	other := filepath.Join(dir, "other")
	if err := os.MkdirAll(filepath.Join(other, "static"), 0o755); err != nil { // a directory of that name
		t.Fatal(err)
	}
	if err := os.Symlink("loop", filepath.Join(dir, "loop")); err != nil {
		t.Fatal(err)
	}
	path := "/no/such/dir:" + other + ":" + dir
	tests := map[string]struct {
		command string
		any     bool
		want    handshake.Cause
	}{
		"static":                  {"static", false, handshake.CauseNone},
		"by path":                 {filepath.Join(dir, "static"), false, handshake.CauseNone},
		"dynamic":                 {"dynamic", false, handshake.CauseNone},
		"without its loader":      {"loaderless", false, handshake.CauseNotFound},
		"for another machine":     {"foreign", false, handshake.CauseFormat},
		"the kernel knows others": {"foreign", true, handshake.CauseNone},
		"script":                  {"script", false, handshake.CauseNone},
		"lost interpreter":        {"lost", false, handshake.CauseNotFound},
		"no interpreter":          {"nameless", false, handshake.CauseFormat},
		"text":                    {"text", false, handshake.CauseFormat},
		"empty file":              {"empty", false, handshake.CauseFormat},
		"no permission":           {"plain", false, handshake.CauseNotExecutable},
		"directory":               {other, false, handshake.CauseNotExecutable},
		"not in PATH":             {"nosuchcommand", false, handshake.CauseNotFound},
		"no such path":            {"/no/such/command", false, handshake.CauseNotFound},
		"through a file":          {filepath.Join(dir, "text", "x"), false, handshake.CauseNotFound},
		"loop of links":           {filepath.Join(dir, "loop"), false, handshake.CauseNotFound},
		"empty":                   {"", false, handshake.CauseNotFound},
		"name too long":           {"/" + strings.Repeat("x", 300), false, handshake.CauseNotFound},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			found, f := lookPath(test.command, path)
			if f == nil && !test.any {
				f = checkFormat(found)
			}
			got := handshake.CauseNone
			if f != nil {
				got = f.cause
			}
			if got != test.want {
				t.Errorf("cause %d (%+v), want %d", got, f, test.want)
			}
		})
	}
	for dir, want := range map[string]handshake.Cause{
		filepath.Join(dir, "missing"): handshake.CauseWorkingDir,
		filepath.Join(dir, "text"):    handshake.CauseWorkingDir,
	} {
		if f := enter(dir); f == nil || f.cause != want {
			t.Errorf("entering %s: %+v", dir, f)
		}
	}
}

func TestUsage(t *testing.T) {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = []string{initDir + "=/nonexistent"}
	cmd.Stderr = &stderr
	_ = cmd.Run()
	if cmd.ProcessState.ExitCode() != handshake.ExitUsage || !strings.Contains(stderr.String(), "workspaced") {
		t.Errorf("%v: %s", cmd.ProcessState, &stderr)
	}
}
