package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// target is what attempts need to know of the machine.
type target struct {
	pid          int // of a process that is not the container's
	major, minor int // of a block device
}

// report is what the attempts came to.
type report struct {
	// Errors has an attempt's errno by its name, like "EPERM"; "" if it worked.
	Errors map[string]string `json:"errors"`
	// Status has lines of /proc/self/status: capabilities and the like.
	Status map[string]string `json:"status"`
	// Cgroups are the lines of /proc/self/cgroup.
	Cgroups []string `json:"cgroups"`
}

// attempts are what a program might do to the machine that it runs on, each as
// far as it shows that it would work, and not so far that it does harm. Those
// that begin with "host" come first: they tell the container's processes from
// others by their numbers, and there are few of its own yet.
var attempts = []struct {
	name string
	try  func(target) error
}{
	{"host: ptrace", func(t target) error {
		if err := unix.PtraceAttach(t.pid); err != nil {
			return err
		}
		if _, err := unix.Wait4(t.pid, nil, unix.WALL, nil); err != nil {
			return err
		}
		return unix.PtraceDetach(t.pid)
	}},
	{"host: memory", func(t target) error { return open(fmt.Sprintf("/proc/%d/mem", t.pid), unix.O_RDWR) }},
	{"host: process_vm_readv", func(t target) error {
		// Whether the address is one does not matter: that is found out last.
		var b [1]byte
		_, err := unix.ProcessVMReadv(t.pid, []unix.Iovec{{Base: &b[0], Len: 1}}, []unix.RemoteIovec{{Base: 8, Len: 1}}, 0)
		if errors.Is(err, unix.EFAULT) {
			return nil
		}
		return err
	}},
	{"host: signal", func(t target) error { return unix.Kill(t.pid, 0) }},

	{"mount", func(target) error {
		dir, err := os.MkdirTemp("", "mount")
		if err != nil {
			return err
		}
		return unix.Mount("tmpfs", dir, "tmpfs", 0, "")
	}},
	{"mount: /sys writable", func(target) error { return unix.Mount("", "/sys", "", unix.MS_REMOUNT|unix.MS_BIND, "") }},
	{"mount: new proc", func(target) error {
		dir, err := os.MkdirTemp("", "proc")
		if err != nil {
			return err
		}
		return unix.Mount("proc", dir, "proc", 0, "")
	}},
	{"mount: fsopen", func(target) error { return closed(unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)) }},
	{"namespace: unshare", func(target) error { return unix.Unshare(unix.CLONE_NEWNS) }},
	{"namespace: user", func(target) error {
		return self(&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS}, "exit", "0")
	}},
	{"namespace: setns", func(target) error {
		fd, err := unix.Open("/proc/self/ns/uts", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Setns(fd, unix.CLONE_NEWUTS)
	}},
	{"chroot", func(target) error { return self(&syscall.SysProcAttr{Chroot: "/"}, "exit", "0") }},
	{"file handle", func(target) error {
		const bound = "/run/workspaced-init" // from the machine
		handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, bound, 0)
		if err != nil {
			return err
		}
		fd, err := unix.Open(bound, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return closed(unix.OpenByHandleAt(fd, handle, unix.O_RDONLY|unix.O_CLOEXEC))
	}},

	{"cgroup: leave", func(target) error {
		dir, err := mountCgroup()
		if err != nil {
			return err
		}
		// What is written as 0 is the writer: it ends with the attempt's process.
		return self(nil, "write", filepath.Join(dir, "cgroup.procs"), "0")
	}},
	{"cgroup: release_agent", func(target) error {
		dir, err := mountCgroup()
		if err != nil {
			return err
		}
		err = open(filepath.Join(dir, "release_agent"), unix.O_WRONLY)
		if errors.Is(err, unix.ENOENT) { // only the first version has one
			return nil
		}
		return err
	}},

	{"device: mknod", func(t target) error { return makeDevice(unix.S_IFBLK, t.major, t.minor, false) }},
	{"device: open disk", func(t target) error { return makeDevice(unix.S_IFBLK, t.major, t.minor, true) }},
	{"device: open /dev/kmsg", func(target) error { return makeDevice(unix.S_IFCHR, 1, 11, true) }},
	{"device: open /dev/mem", func(target) error { return makeDevice(unix.S_IFCHR, 1, 1, true) }},

	{"write: /proc/sys/kernel", func(target) error { return rewrite("/proc/sys/kernel/core_pattern") }},
	{"write: /proc/sys/net", func(target) error { return rewrite("/proc/sys/net/core/somaxconn") }},
	{"write: /proc", func(target) error {
		err := open("/proc/sysrq-trigger", unix.O_WRONLY)
		if errors.Is(err, unix.ENOENT) { // some kernels have none
			err = open("/proc/irq/default_smp_affinity", unix.O_WRONLY)
		}
		return err
	}},
	{"write: /sys", func(target) error { return open(firstWritable("/sys/kernel"), unix.O_WRONLY) }},
	{"read: masked path", func(target) error {
		b, err := os.ReadFile("/proc/timer_list")
		if err == nil && len(b) == 0 {
			return unix.EACCES // there is something else in its place
		}
		return err
	}},
	{"read: kernel log", func(target) error {
		_, err := unix.Klogctl(unix.SYSLOG_ACTION_SIZE_BUFFER, nil)
		return err
	}},

	{"network: raw socket", func(target) error {
		return closed(unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP))
	}},
	{"network: packet socket", func(target) error {
		return closed(unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0))
	}},
	{"network: low port", func(target) error {
		for port := 1023; ; port-- {
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if errors.Is(err, unix.EADDRINUSE) && port > 512 {
				continue
			}
			if err == nil {
				return l.Close()
			}
			return err
		}
	}},
	{"network: configure", func(target) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		lo, err := unix.NewIfreq("lo")
		if err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, lo); err != nil {
			return err
		}
		return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo) // as they are
	}},

	{"kernel: keyctl", func(target) error {
		_, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
		return err
	}},
	{"kernel: bpf", func(target) error {
		attr := struct{ kind, key, value, entries uint32 }{2, 4, 4, 1} // an array
		return call(unix.SYS_BPF, 0, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	}},
	{"kernel: perf_event_open", func(target) error {
		attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_CPU_CLOCK}
		attr.Size = uint32(unsafe.Sizeof(attr))
		return closed(unix.PerfEventOpen(&attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC))
	}},
	{"kernel: io_uring", func(target) error {
		var params [120]byte
		return call(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params[0])), 0)
	}},
	{"kernel: clock", func(target) error {
		err := unix.ClockSettime(unix.CLOCK_REALTIME, &unix.Timespec{Nsec: -1}) // which is no time
		if errors.Is(err, unix.EINVAL) {
			return nil
		}
		return err
	}},

	{"setuid program", setuidProgram},
	{"fork bomb", func(target) error { return bomb() }},
}

// attack makes the attempts of the names, or all, and prints the report.
func attack(args []string) error {
	var t target
	var err error
	if t.pid, err = strconv.Atoi(args[0]); err != nil {
		return err
	}
	if _, err := fmt.Sscanf(args[1], "%d:%d", &t.major, &t.minor); err != nil {
		return err
	}
	r := report{Errors: map[string]string{}, Status: map[string]string{}}
	for _, a := range attempts {
		if names := args[2:]; len(names) == 0 || slices.Contains(names, a.name) {
			r.Errors[a.name] = errnoName(onThread(func() error { return a.try(t) }))
		}
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		if key, value, ok := strings.Cut(line, ":"); ok {
			r.Status[key] = strings.TrimSpace(value)
		}
	}
	cgroups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	r.Cgroups = strings.Split(strings.TrimSpace(string(cgroups)), "\n")
	return json.NewEncoder(os.Stdout).Encode(r)
}

// onThread does it on a thread of its own, which nobody uses afterwards.
func onThread(do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		done <- do()
	}()
	return <-done
}

func errnoName(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return ""
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

func closed(fd int, err error) error {
	if err == nil {
		err = unix.Close(fd)
	}
	return err
}

// call makes a system call that returns a file.
func call(number, a, b, c uintptr) error {
	fd, _, errno := unix.Syscall(number, a, b, c)
	if errno != 0 {
		return errno
	}
	return unix.Close(int(fd))
}

func open(path string, mode int) error { return closed(unix.Open(path, mode|unix.O_CLOEXEC, 0)) }

// rewrite writes what is there.
func rewrite(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	return err
}

// firstWritable is the first file in a directory that its owner may write.
func firstWritable(dir string) string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		panic(err)
	}
	i := slices.IndexFunc(entries, func(e fs.DirEntry) bool {
		info, err := e.Info()
		return err == nil && info.Mode().IsRegular() && info.Mode()&0o200 != 0
	})
	return filepath.Join(dir, entries[i].Name())
}

// mountCgroup mounts the machine's cgroups.
func mountCgroup() (string, error) {
	dir, err := os.MkdirTemp("", "cgroup")
	if err != nil {
		return "", err
	}
	err = unix.Mount("cgroup", dir, "cgroup", 0, "pids")
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EBUSY) {
		err = unix.Mount("cgroup", dir, "cgroup2", 0, "")
	}
	return dir, err
}

// makeDevice makes a device node, and opens it for reading if asked to.
func makeDevice(kind uint32, major, minor int, use bool) error {
	dir, err := os.MkdirTemp("", "device")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "node")
	if err := unix.Mknod(path, kind|0o600, int(unix.Mkdev(uint32(major), uint32(minor)))); err != nil || !use {
		return err
	}
	return open(path, unix.O_RDONLY|unix.O_NONBLOCK)
}

// self runs this program once more.
func self(attr *syscall.SysProcAttr, args ...string) error {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		if errno, err := strconv.Atoi(string(bytes.TrimSpace(out))); err == nil {
			return syscall.Errno(errno)
		}
	}
	return err
}

// setuidProgram makes root's setuid program of this one and runs it as another
// user: does that make it root?
func setuidProgram(target) error {
	dir, err := os.MkdirTemp("", "setuid")
	if err != nil {
		return err
	}
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "program")
	if err := errors.Join(os.WriteFile(path, b, 0o755), os.Chmod(path, 0o755|os.ModeSetuid), os.Chmod(dir, 0o755)); err != nil {
		return err
	}
	cmd := exec.Command(path, "uid")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.Output()
	if err != nil {
		return err
	}
	if string(out) != "0\n" {
		return unix.EPERM
	}
	return nil
}

// bombs is how many processes the bomb has.
const bombs = 60

// bomb makes processes until the kernel says no. They are copies that do nothing:
// a Go program that can't have another thread would end in the middle.
func bomb() error {
	var pids []int
	var failed error
	for range bombs {
		pid, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
		if errno != 0 {
			failed = errno
			break
		}
		if pid == 0 {
			for {
				_, _, _ = syscall.RawSyscall6(syscall.SYS_PPOLL, 0, 0, 0, 0, 0, 0)
			}
		}
		pids = append(pids, int(pid))
	}
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	for _, pid := range pids {
		_, _ = unix.Wait4(pid, nil, 0, nil)
	}
	return failed
}

// writeFile writes, and prints its errno.
func writeFile(path, text string) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(text)
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		fmt.Println(int(errno))
		os.Exit(1)
	}
}
