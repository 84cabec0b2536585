package ctrd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// process is a process of the host that can't be mistaken for a later one of the
// same pid. Waiting for it parks on Go's poller and takes no thread.
type process struct {
	pid  int
	file *os.File // its pidfd
}

// openProcess returns the process that had the pid at the start time, in clock
// ticks since boot, or nil when it is definitely gone.
func openProcess(pid int, start uint64) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("pidfd of process %d: %w", pid, err)
	}
	p := &process{pid: pid, file: os.NewFile(uintptr(fd), "pidfd")}
	// The start time is read after the pidfd was opened: if it matches, the pidfd
	// is that process's, for it had the pid before and after.
	st, err := startTime(pid)
	if err != nil || st != start {
		p.close()
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	return p, nil
}

// openProcess is openProcess as a step.
func (d *Driver) openProcess(ctx context.Context, pid int, start uint64) (p *process, err error) {
	err = d.step(ctx, stepPidfdOpen, func(context.Context) (err error) {
		p, err = openProcess(pid, start)
		return err
	})
	if err != nil && p != nil {
		p.close()
		p = nil
	}
	return p, err
}

func (p *process) close() { p.file.Close() }

// signal sends a signal. A process that is gone is no error.
func (p *process) signal(sig unix.Signal) error {
	var err error
	if cerr := p.control(func(fd int) { err = unix.PidfdSendSignal(fd, sig, nil, 0) }); cerr != nil {
		return cerr
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal %d to process %d: %w", sig, p.pid, err)
	}
	return nil
}

// ended tells whether the process, with all its threads, has ended. When it is
// the first of a pid namespace, so have all others in there.
func (p *process) ended() bool {
	var end bool
	if err := p.control(func(fd int) { end = readable(fd) }); err != nil {
		return false
	}
	return end
}

// wait returns nil once the process has ended, or ctx's error.
func (p *process) wait(ctx context.Context) error {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	return interruptible(ctx, p.file, func() error {
		return conn.Read(func(fd uintptr) bool { return readable(int(fd)) })
	})
}

// exitStatus returns how the process ended, from the kernel (6.15 and later). It
// is known from when its parent has reaped it, as long as the pidfd was opened
// before that.
func (p *process) exitStatus() (unix.WaitStatus, bool) {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	var err error
	if cerr := p.control(func(fd int) { err = unix.IoctlPidfdInfo(fd, &info) }); cerr != nil || err != nil {
		return 0, false
	}
	return unix.WaitStatus(info.Exit_code), info.Mask&unix.PIDFD_INFO_EXIT != 0
}

func (p *process) control(f func(fd int)) error {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Control(func(fd uintptr) { f(int(fd)) })
}

// readable asks without waiting.
func readable(fd int) bool {
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n > 0 && fds[0].Revents != 0
	}
}

// interruptible runs f, which waits for I/O on a pollable file, until ctx ends.
func interruptible(ctx context.Context, file *os.File, f func() error) error {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = file.SetDeadline(time.Unix(1, 0))
	})
	err := f()
	if !stop() {
		<-done
		_ = file.SetDeadline(time.Time{})
	}
	if err != nil && errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// startTime returns when the process started, in clock ticks since boot;
// os.ErrNotExist when it is gone.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, ignoreEnded(err)
	}
	// The second field is the program's name in parentheses, which may hold
	// anything; the start time is field 22, the 20th after it.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat is too short", pid)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

// fileID tells one file from every other.
type fileID struct {
	Dev uint64 `json:"dev"`
	Ino uint64 `json:"ino"`
}

func identify(path string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fileID{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return fileID{Dev: st.Dev, Ino: st.Ino}, nil
}

// executableOf returns which program a process runs; os.ErrNotExist when no thread
// of it runs any, since it is gone, or ending: from when its threads have given up
// their memory until its end is to be seen, its mounts go, which takes long on a
// busy machine.
func executableOf(pid int) (fileID, error) {
	proc := "/proc/" + strconv.Itoa(pid)
	id, err := identify(proc + "/exe")
	if !errors.Is(err, os.ErrNotExist) {
		return id, err
	}
	// Its first thread may have ended before the others.
	threads, rerr := os.ReadDir(proc + "/task")
	if rerr != nil {
		return fileID{}, ignoreEnded(rerr)
	}
	for _, thread := range threads {
		id, terr := identify(proc + "/task/" + thread.Name() + "/exe")
		if terr = ignoreEnded(terr); !errors.Is(terr, os.ErrNotExist) {
			return id, terr
		}
	}
	return fileID{}, err
}

// ignoreEnded makes both of the kernel's words for a process that is gone one.
func ignoreEnded(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return os.ErrNotExist
	}
	return err
}
