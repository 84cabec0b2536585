package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"

	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// failure is why the command can't be executed.
type failure struct {
	cause   handshake.Cause
	errno   syscall.Errno
	message string
}

func fail(cause handshake.Cause, err error, format string, args ...any) *failure {
	f := &failure{cause: cause, message: fmt.Sprintf(format, args...)}
	errors.As(err, &f.errno)
	return f
}

// enter changes into the working directory.
func enter(dir string) *failure {
	err := os.Chdir(dir)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrNotExist):
		return fail(handshake.CauseWorkingDir, err, "working directory %q does not exist", dir)
	case errors.Is(err, syscall.ENOTDIR):
		return fail(handshake.CauseWorkingDir, err, "working directory %q is not a directory", dir)
	default:
		return fail(handshake.CauseWorkingDir, err, "working directory %q can't be entered: %v", dir, errnoText(err))
	}
}

// lookPath finds the command as execvp(3) does, with the rights of this process.
func lookPath(command, path string) (string, *failure) {
	if command == "" {
		return "", fail(handshake.CauseNotFound, syscall.ENOENT, "the command is empty")
	}
	if strings.Contains(command, "/") {
		if err := executable(command); err != nil {
			return "", lookFailure(command, err)
		}
		return command, nil
	}
	var denied string
	for _, file := range handshake.Paths(command, path) {
		err := executable(file)
		if err == nil {
			return file, nil
		}
		// One that may not be executed does not end the search, but is a better
		// answer than "not found".
		if denied == "" && errors.Is(err, syscall.EACCES) {
			if st, serr := os.Stat(file); serr == nil && !st.IsDir() {
				denied = file
			}
		}
	}
	if denied != "" {
		return "", lookFailure(denied, syscall.EACCES)
	}
	return "", fail(handshake.CauseNotFound, syscall.ENOENT, "command %q is in no directory of PATH=%q", command, path)
}

// executable returns nil when this process may execute the file.
func executable(file string) error {
	st, err := os.Stat(file)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return syscall.EACCES
	}
	const execute = 1 // X_OK
	return syscall.Faccessat(-100 /* AT_FDCWD */, file, execute, 0)
}

func lookFailure(file string, err error) *failure {
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENAMETOOLONG):
		return fail(handshake.CauseNotFound, err, "command %q does not exist", file)
	case errors.Is(err, os.ErrPermission):
		return fail(handshake.CauseNotExecutable, err, "command %q is not executable by user %d", file, os.Getuid())
	default:
		return fail(handshake.CauseNotExecutable, err, "command %q can't be executed: %v", file, errnoText(err))
	}
}

// execFailure tells what execve's error means.
func execFailure(path string, err error) *failure {
	switch {
	case errors.Is(err, syscall.ENOEXEC):
		return fail(handshake.CauseFormat, err, "command %q: %v", path, errnoText(err))
	case errors.Is(err, syscall.E2BIG):
		return fail(handshake.CauseExec, err, "arguments and environment are larger than the kernel takes")
	default:
		return fail(handshake.CauseExec, err, "command %q: %v", path, errnoText(err))
	}
}

func errnoText(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
}

// checkFormat looks at a program's first bytes: whether the kernel can load it,
// and whether the interpreter that it names exists. What it can't read or does
// not know about, it lets pass: execve has the last word.
func checkFormat(path string) *failure {
	for range 5 { // the kernel follows as many interpreters
		f, err := os.Open(path)
		if err != nil {
			return nil // executable, but not readable
		}
		interpreter, fl := inspect(path, f)
		f.Close()
		if fl != nil || interpreter == "" {
			return fl
		}
		if err := executable(interpreter); err != nil {
			return fail(handshake.CauseNotFound, err, "command %q needs the interpreter %q, which is not there or not executable", path, interpreter)
		}
		path = interpreter
	}
	return nil
}

// inspect returns the interpreter that a script or a dynamic program names.
func inspect(path string, r io.ReaderAt) (interpreter string, f *failure) {
	head := make([]byte, 256)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", nil
	}
	head = head[:n]
	switch {
	case bytes.HasPrefix(head, []byte("#!")):
		line, _ := bufio.NewReader(bytes.NewReader(head[2:])).ReadString('\n')
		if fields := strings.Fields(line); len(fields) > 0 {
			return fields[0], nil
		}
		return "", fail(handshake.CauseFormat, syscall.ENOEXEC, "script %q names no interpreter after #!", path)
	case bytes.HasPrefix(head, []byte("\x7fELF")) && len(head) >= 64:
		return inspectELF(path, head, r)
	default:
		return "", fail(handshake.CauseFormat, syscall.ENOEXEC, "command %q is neither a program for this machine nor a script with a #! line", path)
	}
}

// machines are the ELF machines that a kernel may execute: its own and, where
// it is commonly built in, the 32-bit one.
var machines = map[string][]uint16{
	"amd64":   {62, 3},   // EM_X86_64, EM_386
	"386":     {3},       // EM_386
	"arm64":   {183, 40}, // EM_AARCH64, EM_ARM
	"arm":     {40},      // EM_ARM
	"riscv64": {243},     // EM_RISCV
	"ppc64le": {21},      // EM_PPC64
	"s390x":   {22},      // EM_S390
}

func inspectELF(path string, head []byte, r io.ReaderAt) (interpreter string, f *failure) {
	var order binary.ByteOrder = binary.LittleEndian
	if head[5] == 2 { // ELFDATA2MSB
		order = binary.BigEndian
	}
	machine := order.Uint16(head[18:])
	if known, ok := machines[runtime.GOARCH]; ok {
		ours := false
		for _, m := range known {
			ours = ours || m == machine
		}
		if !ours {
			return "", fail(handshake.CauseFormat, syscall.ENOEXEC, "command %q is made for another machine (ELF machine %d, this is %s)", path, machine, runtime.GOARCH)
		}
	}
	if head[4] != 2 { // not ELFCLASS64: its loader is execve's business
		return "", nil
	}
	offset, size, count := order.Uint64(head[32:]), order.Uint16(head[54:]), order.Uint16(head[56:])
	if size < 56 || offset > 1<<40 {
		return "", nil
	}
	const interpreterSegment = 3 // PT_INTERP
	segment := make([]byte, 56)
	for i := range count {
		if _, err := r.ReadAt(segment, int64(offset)+int64(i)*int64(size)); err != nil {
			return "", nil
		}
		if order.Uint32(segment) != interpreterSegment {
			continue
		}
		at, length := order.Uint64(segment[8:]), order.Uint64(segment[32:])
		if length < 2 || length > 4096 || at > 1<<40 {
			return "", nil
		}
		name := make([]byte, length)
		if _, err := r.ReadAt(name, int64(at)); err != nil {
			return "", nil
		}
		return strings.TrimRight(string(name), "\x00"), nil
	}
	return "", nil
}
