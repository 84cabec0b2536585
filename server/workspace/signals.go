package workspace

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
)

// sigRTMin is glibc's SIGRTMIN, which is what systemd means by SIGRTMIN+3: the
// kernel's first real-time signals belong to the C library.
const sigRTMin = 34

// stopSignal is the signal of that name, which the API has checked.
func stopSignal(name string) syscall.Signal {
	if name == "SIGRTMIN+3" {
		return syscall.Signal(sigRTMin + 3)
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig
	}
	return syscall.SIGTERM
}

// liveSignal is the signal of that name, which the API has checked; 0 for none.
func liveSignal(name string) syscall.Signal { return unix.SignalNum(name) }

// exitMessage says in words how a container ended.
func exitMessage(e runtime.Exit) string {
	switch {
	case e.OOMKilled:
		return "the container was killed for want of memory"
	case !e.Known:
		return "the container ended while nobody watched"
	case e.Signal != 0:
		name := unix.SignalName(syscall.Signal(e.Signal))
		if name == "" {
			name = fmt.Sprintf("signal %d", e.Signal)
		}
		return "the container was ended by " + name
	default:
		return fmt.Sprintf("the container's command ended with code %d", e.Code)
	}
}
