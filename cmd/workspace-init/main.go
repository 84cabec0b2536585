// Workspace-init is the first process of a workspace's container until the
// workspace is switched over to it: it checks that the command can be executed,
// reports that, waits for the environment, and becomes the command. It is
// static, needs nothing of the image, and works as any user with a read-only
// root. The driver in runtime/ctrd starts it; package handshake has the
// protocol.
//
//	workspace-init WORKING_DIR FORMATS COMMAND [ARG...]
//
// FORMATS is "any" where the host's kernel executes more than its own binaries
// (binfmt_misc), and "own" elsewhere.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// The command shall come from the thread that the container began with.
func init() { runtime.LockOSThread() }

func main() { os.Exit(run(handshake.Dir, os.Args)) }

func run(dir string, args []string) int {
	if len(args) < 4 {
		fmt.Fprintln(os.Stderr, "workspace-init is started by workspaced, as the first process of a container")
		return handshake.ExitUsage
	}
	workingDir, anyFormat, argv := args[1], args[2] == "any", args[3:]

	// Opening neither may block: with no daemon on the other side there is nobody
	// to wait for.
	goAhead, err := openFIFO(filepath.Join(dir, handshake.GoAheadName), syscall.O_RDONLY)
	if err != nil {
		return handshake.ExitUsage
	}
	result, err := openFIFO(filepath.Join(dir, handshake.ResultName), syscall.O_WRONLY)
	if errors.Is(err, syscall.ENXIO) {
		return handshake.ExitNoDaemon
	} else if err != nil {
		return handshake.ExitUsage
	}

	refuse := func(f *failure) int {
		// Nobody is left to tell when this fails.
		_ = handshake.WriteResult(result, handshake.Result{
			Kind: handshake.Failed, Cause: f.cause, Errno: uint32(f.errno), Message: f.message,
		})
		return handshake.ExitRefused
	}
	if f := enter(workingDir); f != nil {
		return refuse(f)
	}
	path, f := lookPath(argv[0], os.Getenv("PATH"))
	if f == nil && !anyFormat {
		f = checkFormat(path)
	}
	if f != nil {
		return refuse(f)
	}
	if err := handshake.WriteResult(result, handshake.Result{Kind: handshake.Ready}); err != nil {
		return handshake.ExitNoDaemon
	}

	message, err := handshake.ReadGoAhead(goAhead)
	if err != nil {
		return handshake.ExitNoDaemon
	}
	env := withHome(message.Env, os.Getenv("HOME"))
	if path, f = lookPath(argv[0], lookup(env, "PATH")); f != nil {
		return refuse(f)
	}
	// The workspace has one log. Through one pipe its lines come in the order in
	// which they were written; and of two, containerd's shim drops what is left in
	// the second when the first one ends.
	if err := syscall.Dup3(1, 2, 0); err != nil {
		return refuse(fail(handshake.CauseExec, err, "standard error can't be set up: %v", errnoText(err)))
	}
	if err := handshake.WriteResult(result, handshake.Result{Kind: handshake.Executing}); err != nil {
		return handshake.ExitNoDaemon
	}
	return refuse(execFailure(path, syscall.Exec(path, argv, env)))
}

// openFIFO opens it so that Go's poller waits for it and no command inherits it.
func openFIFO(path string, mode int) (*os.File, error) {
	fd, err := syscall.Open(path, mode|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// lookup returns the last value of key.
func lookup(env []string, key string) string {
	for i := len(env) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(env[i], key+"="); ok {
			return v
		}
	}
	return ""
}

// withHome adds the HOME that the OCI runtime found in /etc/passwd.
func withHome(env []string, home string) []string {
	if home == "" {
		return env
	}
	for _, e := range env {
		if strings.HasPrefix(e, "HOME=") {
			return env
		}
	}
	return append(env, "HOME="+home)
}
