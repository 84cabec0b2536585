package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

func TestFramesAreThePackages(t *testing.T) {
	for _, test := range []struct {
		frame [frameSize]byte
		errno uint32
		want  handshake.Result
	}{
		{frame: readyFrame, want: handshake.Result{Kind: handshake.Ready}},
		{frame: executingFrame, want: handshake.Result{Kind: handshake.Executing}},
		{frame: failedFrame, errno: 7, want: handshake.Result{Kind: handshake.Failed, Cause: handshake.CauseExec, Errno: 7}},
	} {
		test.frame[frameErrno] = byte(test.errno)
		var b bytes.Buffer
		if err := handshake.WriteResult(&b, test.want); err != nil || !bytes.Equal(b.Bytes(), test.frame[:]) {
			t.Errorf("%+v is %q, %v, the standby writes %q", test.want, b.Bytes(), err, test.frame)
		}
	}
}

// standby runs one of that program, which may be missing, with HOME, sends it the
// bytes, and returns what it reported and how it ended.
func standby(t *testing.T, self string, env []string, sent []byte) (results []handshake.Result, code int, out string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(t))
	cmd.Args = []string{handshake.StandbyName, self}
	cmd.Env = append([]string{}, env...) // not the test's
	cmd.Dir = "/"
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	goAhead, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r, result, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	cmd.ExtraFiles = slices.Repeat([]*os.File{null}, resultFD-2) // from 3 on
	cmd.ExtraFiles[goAheadFD-3], cmd.ExtraFiles[resultFD-3] = goAhead, result
	err = cmd.Start()
	goAhead.Close()
	result.Close()
	if err != nil {
		t.Fatal(err)
	}
	if ready, err := handshake.ReadResult(r); err != nil || ready.Kind != handshake.Ready {
		t.Fatalf("result %+v, %v, want Ready", ready, err)
	}
	go func() {
		defer w.Close()
		_, _ = w.Write(sent) // EPIPE when it ends before it has read all of it
	}()
	for {
		res, err := handshake.ReadResult(r)
		if err != nil {
			break
		}
		results = append(results, res)
	}
	_ = cmd.Wait()
	return results, cmd.ProcessState.ExitCode(), output.String()
}

func block(t *testing.T, g handshake.GoAhead) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := handshake.WriteGoAhead(&b, g); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Whatever is not one whole block starts nothing.
func TestStandbyTakesWholeBlocks(t *testing.T) {
	whole := block(t, handshake.GoAhead{Argv: []string{"/bin/echo", "started"}, Env: []string{"SECRET=value"}})
	size := func(n uint64) []byte {
		b := slices.Clone(whole)
		binary.LittleEndian.PutUint64(b[handshake.BlockSize:], n)
		return b
	}
	for name, test := range map[string]struct {
		sent []byte
		code int
	}{
		"whole":                       {whole, 0},
		"nothing":                     {nil, handshake.ExitNoDaemon},
		"a byte":                      {whole[:1], handshake.ExitNoDaemon},
		"the header but a byte":       {whole[:handshake.BlockHeader-1], handshake.ExitNoDaemon},
		"the header":                  {whole[:handshake.BlockHeader], handshake.ExitNoDaemon},
		"all but a byte":              {whole[:len(whole)-1], handshake.ExitNoDaemon},
		"a byte too many":             {append(slices.Clone(whole), 0), handshake.ExitNoDaemon},
		"another magic":               {append([]byte{'X'}, whole[1:]...), handshake.ExitNoDaemon},
		"a size smaller than it is":   {size(uint64(len(whole) - 1)), handshake.ExitNoDaemon},
		"a size larger than it is":    {size(uint64(len(whole) + 1)), handshake.ExitNoDaemon},
		"no size":                     {size(0), handshake.ExitNoDaemon},
		"a size beyond all limits":    {size(1 << 62), handshake.ExitNoDaemon},
		"a size that is negative":     {size(1 << 63), handshake.ExitNoDaemon},
		"more than there is room":     {append(size(handshake.MaxGoAhead+1), make([]byte, handshake.MaxGoAhead)...), handshake.ExitNoDaemon},
		"as much as there is room of": {append(size(handshake.MaxGoAhead), make([]byte, handshake.MaxGoAhead-len(whole))...), 0},
	} {
		t.Run(name, func(t *testing.T) {
			results, code, out := standby(t, program(t), nil, test.sent)
			started := ""
			if test.code == 0 {
				started = "started\n"
			}
			if code != test.code || out != started || (len(results) > 0) != (test.code == 0) {
				t.Errorf("code %d, output %q, results %+v", code, out, results)
			}
		})
	}
}

// What the command is given is what was sent, and nothing else.
func TestStandbyHandsOver(t *testing.T) {
	large := make([]string, 9000) // 1.2 MB, many times what a pipe holds
	for i := range large {
		large[i] = "V" + strings.Repeat("x", i%100) + "=" + strings.Repeat("y", 64)
	}
	tests := map[string]struct {
		home []string
		env  []string
		want []string
	}{
		"nothing":            {},
		"no HOME in passwd":  {nil, []string{"A=1", "B="}, []string{"A=1", "B="}},
		"HOME of passwd":     {[]string{"HOME=/root"}, []string{"A=1"}, []string{"A=1", "HOME=/root"}},
		"HOME alone":         {[]string{"HOME=/root"}, nil, []string{"HOME=/root"}},
		"HOME that was sent": {[]string{"HOME=/root"}, []string{"HOME=", "A=1"}, []string{"HOME=", "A=1"}},
		"much":               {[]string{"HOME=/root"}, large, append(slices.Clone(large), "HOME=/root")},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			sent := block(t, handshake.GoAhead{Argv: []string{"/bin/cat", "/proc/self/environ"}, Env: test.env})
			results, code, out := standby(t, program(t), test.home, sent)
			if len(results) != 1 || results[0].Kind != handshake.Executing || code != 0 {
				t.Fatalf("results %+v, code %d, output %.200q", results, code, out)
			}
			var want string
			for _, e := range test.want {
				want += e + "\x00"
			}
			if out != want {
				t.Errorf("environment %.200q, want %.200q", out, want)
			}
		})
	}
	t.Run("arguments", func(t *testing.T) {
		argv := []string{"/bin/cat", "/proc/self/cmdline", "/dev/null"}
		if _, code, out := standby(t, program(t), nil, block(t, handshake.GoAhead{Argv: argv})); code != 0 || out != strings.Join(argv, "\x00")+"\x00" {
			t.Errorf("code %d, arguments %q", code, out)
		}
	})
	t.Run("no FIFO", func(t *testing.T) {
		sent := block(t, handshake.GoAhead{Argv: []string{"/bin/ls", "-d", "/proc/self/fd/9", "/proc/self/fd/10", "/proc/self/fd/11"}})
		if _, _, out := standby(t, program(t), nil, sent); !strings.Contains(out, "\n/proc/self/fd/9\n") || strings.Count(out, "No such file") != 2 {
			t.Errorf("the command has the files %q", out)
		}
	})
}

// The command is looked for as lookPath does, and why it was not found, or not
// executed, is told in the same words.
func TestStandbyLooksForTheCommand(t *testing.T) {
	dir := t.TempDir()
	script := func(mode os.FileMode, text string, path ...string) {
		t.Helper()
		file := filepath.Join(append([]string{dir}, path...)...)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	script(0o755, "#!/bin/sh\necho one\n", "one", "command")
	script(0o755, "#!/bin/sh\necho two\n", "two", "command")
	script(0o644, "#!/bin/sh\necho plain\n", "plain", "command")
	script(0o755, "#!/no/such/shell\n", "lost", "command")
	script(0o755, "\x7fELF nothing", "broken", "command")
	if err := os.MkdirAll(filepath.Join(dir, "directory", "command"), 0o755); err != nil {
		t.Fatal(err)
	}
	path := func(names ...string) string {
		for i := range names {
			names[i] = filepath.Join(dir, names[i])
		}
		return strings.Join(names, ":")
	}
	for name, test := range map[string]struct {
		command, path string
		out           string
		cause         handshake.Cause
		errno         syscall.Errno
		message       string
	}{
		"the first":           {command: "command", path: path("one", "two"), out: "one\n"},
		"where there is one":  {command: "command", path: path("missing", "directory", "plain", "two", "one"), out: "two\n"},
		"by its path":         {command: filepath.Join(dir, "one", "command"), path: path("two"), out: "one\n"},
		"nowhere":             {command: "command", path: path("missing", "directory"), cause: handshake.CauseNotFound, errno: syscall.ENOENT, message: "in no directory of PATH"},
		"without a PATH":      {command: "command", cause: handshake.CauseNotFound, errno: syscall.ENOENT, message: "in no directory of PATH"},
		"not executable":      {command: "command", path: path("missing", "plain"), cause: handshake.CauseNotExecutable, errno: syscall.EACCES, message: "not executable by user"},
		"no such path":        {command: "/no/such/command", cause: handshake.CauseNotFound, errno: syscall.ENOENT, message: "does not exist"},
		"a directory":         {command: filepath.Join(dir, "one"), cause: handshake.CauseNotExecutable, errno: syscall.EACCES, message: "not executable"},
		"of no interpreter":   {command: "command", path: path("lost", "one"), cause: handshake.CauseExec, errno: syscall.ENOENT, message: "no such file"},
		"no program":          {command: "command", path: path("broken", "one"), cause: handshake.CauseFormat, errno: syscall.ENOEXEC, message: "exec format error"},
		"an empty name of it": {command: "", path: path("one"), cause: handshake.CauseNotFound, errno: syscall.ENOENT, message: "is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			results, code, out := standby(t, program(t), nil, block(t, handshake.GoAhead{
				Argv: []string{test.command}, Env: []string{"PATH=" + test.path, "SECRET=canary"},
			}))
			if test.cause == handshake.CauseNone {
				if code != 0 || out != test.out {
					t.Errorf("code %d, output %q, results %+v", code, out, results)
				}
				return
			}
			var last handshake.Result
			if len(results) > 0 {
				last = results[len(results)-1]
			}
			if last.Kind != handshake.Failed || last.Cause != test.cause || syscall.Errno(last.Errno) != test.errno || !strings.Contains(last.Message, test.message) {
				t.Errorf("results %+v", results)
			}
			if code != handshake.ExitRefused || out != "" || strings.Contains(last.Message, "canary") {
				t.Errorf("code %d, output %q, results %+v", code, out, results)
			}
		})
	}
}

func TestStandbyExplainsWhatIsTooLarge(t *testing.T) {
	sent := block(t, handshake.GoAhead{Argv: []string{"/bin/echo", "started"}, Env: []string{"BIG=" + strings.Repeat("x", 200<<10)}})
	results, code, out := standby(t, program(t), nil, sent)
	if len(results) != 3 || results[2].Kind != handshake.Failed || syscall.Errno(results[2].Errno) != syscall.E2BIG || results[2].Message == "" || code != handshake.ExitRefused || out != "" {
		t.Errorf("results %+v, code %d, output %q", results, code, out)
	}
}

// Where nobody is left to explain it, a failure is told all the same: a daemon that
// saw no more than the end would think that the command runs.
func TestStandbyReportsAFailureItself(t *testing.T) {
	file := filepath.Join(t.TempDir(), "object")
	if err := os.WriteFile(file, []byte("\x7fELF nothing"), 0o755); err != nil {
		t.Fatal(err)
	}
	for self, code := range map[string]int{"/no/such/init": handshake.ExitRefused, "/bin/false": 1} {
		results, got, _ := standby(t, self, nil, block(t, handshake.GoAhead{Argv: []string{file}}))
		want := []handshake.Result{
			{Kind: handshake.Executing},
			{Kind: handshake.Failed, Cause: handshake.CauseExec, Errno: uint32(syscall.ENOEXEC)},
		}
		if !slices.Equal(results, want) || got != code {
			t.Errorf("%s: results %+v, code %d", self, results, got)
		}
	}
}

// Built without its entry it says so, and is no standby.
func TestStandbyNeedsItsEntry(t *testing.T) {
	if code := run(t.TempDir(), []string{handshake.StandbyName, "/init"}); code != handshake.ExitUsage {
		t.Errorf("code %d", code)
	}
}
