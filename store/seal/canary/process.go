package canary

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// CommandLine searches what everybody may read of a process: its arguments and its
// name. One that has ended has neither.
func (s *Search) CommandLine(pid int) error { return s.proc(pid, "cmdline", "comm") }

// Process searches the command line, the environment and the open files of a
// process that have no name: they are in no directory.
func (s *Search) Process(pid int) error {
	if err := errors.Join(s.CommandLine(pid), s.proc(pid, "environ")); err != nil {
		return err
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err := unlessGone(err); err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, err := os.Stat(path) // of what it leads to
		if err == nil && info.Mode().IsRegular() && info.Sys().(*syscall.Stat_t).Nlink == 0 {
			err = s.File(path)
		}
		if err := unlessGone(err); err != nil {
			return err
		}
	}
	return nil
}

func (s *Search) proc(pid int, names ...string) error {
	for _, name := range names {
		if err := unlessGone(s.File(fmt.Sprintf("/proc/%d/%s", pid, name))); err != nil {
			return err
		}
	}
	return nil
}

// unlessGone returns the error, but for one that says that the process has ended.
func unlessGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}
