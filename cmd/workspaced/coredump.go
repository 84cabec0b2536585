package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// setCoreDumps says whether the kernel may write this process's memory to a file
// when it crashes. Secrets pass through that memory in plaintext, so usually it
// may not: the size limit keeps files from being written, and "not dumpable" also
// keeps the memory from a crash handler that the core pattern names, which no
// limit holds off, and from a debugger that is not root's. Go dumps core only
// when GOTRACEBACK=crash is set, but that is for the environment to say.
//
// Only the soft limit is changed. What the daemon starts, the private containerd
// and by way of it shims and runc, inherits it, and may raise it; "not dumpable"
// is gone with their exec. They get no secret. What a container may dump, its OCI
// spec says (package ctrd).
//
// Memory that the kernel swaps out is another way to a disk. A Go program can't find
// every copy of a value to lock it: that the machine's swap is encrypted or off is its
// administrator's part (docs/security.md).
func setCoreDumps(allowed bool) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil {
		return fmt.Errorf("core_dumps: the limit can't be read: %w", err)
	}
	limit.Cur = 0
	dumpable := uintptr(0)
	if allowed {
		limit.Cur, dumpable = limit.Max, 1
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &limit); err != nil {
		return fmt.Errorf("core_dumps: the limit can't be set: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, dumpable, 0, 0, 0); err != nil {
		return fmt.Errorf("core_dumps: can't be set to %v: %w", allowed, err)
	}
	return nil
}
