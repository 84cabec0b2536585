// Workspace-init is the first process of a workspace's container until the
// workspace is switched over to it: it checks that the command can be executed,
// becomes a standby that reports this, waits for the go-ahead, and becomes the
// command. It is static, needs nothing of the image, and works as any user with a
// read-only root. The driver in runtime/ctrd starts it; package handshake has the
// protocol.
//
//	workspace-init WORKING_DIR FORMATS COMMAND [ARG...]
//	workspace-init explain ERRNO COMMAND
//	standby WORKSPACE_INIT
//
// FORMATS is "any" where the host's kernel executes more than its own binaries
// (binfmt_misc), and "own" elsewhere. The arguments come with the go-ahead; here they
// are for who looks at the container. The second form says why a standby did not
// become the command. The third is the standby, which only a program that was
// linked with -E workspace_init_entry can be; its argument is its own path.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// The command shall come from the thread that the container began with.
func init() { runtime.LockOSThread() }

func main() { os.Exit(run(handshake.Dir, os.Args)) }

func run(dir string, args []string) int {
	switch {
	case args[0] == handshake.StandbyName:
		fmt.Fprintln(os.Stderr, "workspace-init was not linked with -E workspace_init_entry: build it by make build")
		return handshake.ExitUsage
	case len(args) > 1 && args[1] == handshake.ExplainArg:
		return explain(args[2:])
	case len(args) < 4:
		fmt.Fprintln(os.Stderr, "workspace-init is started by workspaced, as the first process of a container")
		return handshake.ExitUsage
	}
	self, workingDir, anyFormat, command := args[0], args[1], args[2] == "any", args[3]

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
	if f := check(workingDir, command, anyFormat); f != nil {
		return refuse(result, f)
	}
	// The workspace has one log. Through one pipe its lines come in the order in
	// which they were written; and of two, containerd's shim drops what is left in
	// the second when the first one ends.
	if err := syscall.Dup3(1, 2, 0); err != nil {
		return refuse(result, fail(handshake.CauseExec, err, "standard error can't be set up: %v", errnoText(err)))
	}
	err = becomeStandby(self, os.Getenv("HOME"), goAhead, result)
	return refuse(result, fail(handshake.CauseExec, err, "workspace-init can't be executed: %v", errnoText(err)))
}

// check enters the working directory and tells whether the command can be executed
// there.
func check(workingDir, command string, anyFormat bool) *failure {
	if f := enter(workingDir); f != nil {
		return f
	}
	path, f := lookPath(command, os.Getenv("PATH"))
	if f == nil && !anyFormat {
		f = checkFormat(path)
	}
	return f
}

func refuse(result int, f *failure) int {
	// Nobody is left to tell when this fails.
	_ = handshake.WriteResult(os.NewFile(uintptr(result), handshake.ResultName), handshake.Result{
		Kind: handshake.Failed, Cause: f.cause, Errno: uint32(f.errno), Message: f.message,
	})
	return handshake.ExitRefused
}

// openFIFO opens it, which does not block: with no daemon on the other side there is
// nobody to wait for.
func openFIFO(path string, mode int) (fd int, err error) {
	fd, err = syscall.Open(path, mode|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	return fd, syscall.SetNonblock(fd, false)
}
