package main

import (
	"errors"
	"os"
	"syscall"

	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// A standby is this program started under handshake.StandbyName, with the path of
// this program as its only argument and at most HOME as its environment. Its entry,
// in standby_*.s, is the program's: the linker is told so by -E workspace_init_entry.
// There Go's runtime is left out for a standby: what it does is
//
//	map a block of memory for the go-ahead
//	write readyFrame
//	read the block; end with ExitNoDaemon if it ends early
//	put HOME into the environment if it has a place there
//	take the first of the paths that is a regular file which may be executed
//	write executingFrame, execve
//	when there is none, or execve fails: write failedFrame, become workspace-init
//	explain, with the result FIFO; when that fails too: end with ExitRefused
//
// Package handshake has the block.
const (
	// Where the standby has the FIFOs.
	goAheadFD = handshake.GoAheadFD
	resultFD  = handshake.ResultFD

	// For standby_*.s, which gets constants of this package alone.
	blockMagic       = handshake.BlockMagic
	blockAddress     = handshake.BlockAddress
	blockLimit       = handshake.MaxGoAhead
	blockSize        = handshake.BlockSize
	blockArgv        = handshake.BlockArgv
	blockEnvp        = handshake.BlockEnvp
	blockPaths       = handshake.BlockPaths
	blockHome        = handshake.BlockHome
	blockExplainArgv = handshake.BlockExplainArgv
	blockExplainEnvp = handshake.BlockExplainEnvp
	blockErrno       = handshake.BlockErrno
	blockHeader      = handshake.BlockHeader
	blockPresent     = 64 << 10 // what is given memory before it is needed, in bytes
	frameSize        = 12
	frameErrno       = 11 // the last byte of an error number
	exitUsage        = handshake.ExitUsage
	exitNoDaemon     = handshake.ExitNoDaemon
	exitRefused      = handshake.ExitRefused
)

// What a standby reports, as handshake.WriteResult would write it.
var (
	readyFrame     = [frameSize]byte{'W', 'S', 'R', '2', 0, 6, byte(handshake.Ready)}
	executingFrame = [frameSize]byte{'W', 'S', 'R', '2', 0, 6, byte(handshake.Executing)}
	failedFrame    = [frameSize]byte{'W', 'S', 'R', '2', 0, 6, byte(handshake.Failed), byte(handshake.CauseExec)}
)

// becomeStandby returns only when it fails.
func becomeStandby(self, home string, goAhead, result int) error {
	for _, fifo := range []*int{&goAhead, &result} { // away from both places
		fd, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(*fifo), syscall.F_DUPFD_CLOEXEC, resultFD+1)
		if errno != 0 {
			return errno
		}
		*fifo = int(fd)
	}
	err := errors.Join(syscall.Dup3(goAhead, goAheadFD, 0), syscall.Dup3(result, resultFD, 0))
	if err != nil {
		return err
	}
	var env []string
	if home != "" { // that the OCI runtime found in /etc/passwd
		env = []string{"HOME=" + home}
	}
	return syscall.Exec(self, []string{handshake.StandbyName, self}, env)
}

// explain says why a standby did not become the command.
func explain(args []string) int {
	if len(args) != 2 {
		return handshake.ExitUsage
	}
	number, _ := handshake.Errno(args[0])
	path, f := lookPath(args[1], os.Getenv("PATH"))
	if f == nil {
		f = execFailure(path, syscall.Errno(number))
	}
	return refuse(resultFD, f)
}
