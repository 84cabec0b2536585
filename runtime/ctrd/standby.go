package ctrd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// standby is this process's side of an instance that waits for its go-ahead.
// As long as the go-ahead FIFO is open here the instance's init waits; when it
// closes, also by this process's death, init ends.
type standby struct {
	dir             string // of the FIFOs
	record          *record
	imageEnv        []string
	argv            []string
	goAhead, result *os.File
	process         *process

	taken bool // guarded by Driver.mu: Arm or Start has it
	ahead bool // guarded by Driver.recordMu: armedFile is the newest record with armed's launch

	// Who has taken it has these, and record.
	armed  *armed // nil: nothing is ready
	placed bool   // just these files are in place
	files  []runtime.File
	names  []string // of the files
}

// makeFIFOs makes and opens the FIFOs, which only the container's user can open.
// The go-ahead is open for reading too until init has opened it: else it would
// see no writer.
func (s *standby) makeFIFOs(user specs.User) error {
	for name, mode := range map[string]uint32{handshake.GoAheadName: 0o400, handshake.ResultName: 0o200} {
		path := filepath.Join(s.dir, name)
		if err := unix.Mkfifo(path, mode); err != nil {
			return &os.PathError{Op: "mkfifo", Path: path, Err: err}
		}
		if err := os.Lchown(path, int(user.UID), int(user.GID)); err != nil {
			return err
		}
	}
	var err error
	if s.goAhead, err = openFIFO(filepath.Join(s.dir, handshake.GoAheadName), unix.O_RDWR); err != nil {
		return err
	}
	s.result, err = openFIFO(filepath.Join(s.dir, handshake.ResultName), unix.O_RDONLY)
	return err
}

// openFIFO opens one so that Go's poller waits for it: no thread ever hangs in
// a read or write, and deadlines work.
func openFIFO(path string, mode int) (*os.File, error) {
	fd, err := unix.Open(path, mode|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// close lets go of what there is of it.
func (s *standby) close() {
	for _, fifo := range []*os.File{s.goAhead, s.result} {
		if fifo != nil {
			fifo.Close()
		}
	}
	if s.process != nil {
		s.process.close()
	}
}

// awaitReady waits for init's report, and from then on sees init's death as the
// end of the result FIFO, as init sees ours.
func (d *Driver) awaitReady(ctx context.Context, s *standby, limits runtime.Resources) error {
	ctx, cancel := context.WithTimeout(ctx, d.deadlines.ready)
	defer cancel()
	err := d.step(ctx, stepInitReady, func(ctx context.Context) error { return d.readReady(ctx, s, limits) })
	if err != nil {
		return failure(ctx, "the container's first process", err)
	}
	return d.step(ctx, stepFIFOOpen, func(context.Context) error {
		err := s.holdGoAhead()
		if errors.Is(err, unix.ENXIO) {
			return s.interrupted(limits)
		}
		return err
	})
}

// readReady reads init's report.
func (d *Driver) readReady(ctx context.Context, s *standby, limits runtime.Resources) error {
	// Until init opens the result FIFO, its end is not to be seen there.
	watch, stop := context.WithCancel(ctx)
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		_ = d.guard("the watch of a container's first process", func() error {
			if s.process != nil && s.process.wait(watch) != nil {
				return nil
			}
			// What it wrote before its end is still to be read.
			return s.result.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		}) // at worst the report's deadline passes
	}()
	res, err := s.readResult(ctx)
	stop()
	<-watching
	_ = s.result.SetReadDeadline(time.Time{})
	switch {
	case err == nil && res.Kind == handshake.Ready && s.process != nil:
		return nil
	case err == nil && res.Kind == handshake.Failed:
		return refusal(res)
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil && res.Kind == handshake.Executing:
		return fmt.Errorf("workspace-init reported %+v before it was asked", res)
	default:
		return s.interrupted(limits)
	}
}

// holdGoAhead makes this process the go-ahead's writer and nothing else, as it is
// now open in init.
func (s *standby) holdGoAhead() error {
	writer, err := openFIFO(filepath.Join(s.dir, handshake.GoAheadName), unix.O_WRONLY)
	if err != nil {
		return err
	}
	s.goAhead.Close()
	s.goAhead = writer
	return nil
}

func (s *standby) interrupted(limits runtime.Resources) error {
	return &runtime.Error{
		Reason:  runtime.ReasonStartInterrupted,
		Message: "the container's first process ended before it became the command" + limitsHint(limits),
	}
}

// readResult reads one. A FIFO that no writer has opened yet reads as ended, so
// it waits for the poller first.
func (s *standby) readResult(ctx context.Context) (handshake.Result, error) {
	conn, err := s.result.SyscallConn()
	if err != nil {
		return handshake.Result{}, err
	}
	var res handshake.Result
	err = interruptible(ctx, s.result, func() error {
		if err := conn.Read(func(fd uintptr) bool { return readable(int(fd)) }); err != nil {
			return err
		}
		var err error
		res, err = handshake.ReadResult(s.result)
		return err
	})
	return res, err
}

// refusal is what init's report of a failure means.
func refusal(res handshake.Result) *runtime.Error {
	errno := syscall.Errno(res.Errno)
	// A message that was too long may be cut within a letter.
	e := &runtime.Error{Message: strings.ToValidUTF8(res.Message, "?"), Permanent: permanent(errno), Err: errno}
	if e.Message == "" {
		e.Message = "the command can't be executed, and it could not be found out why"
	}
	switch res.Cause {
	case handshake.CauseNotFound:
		e.Reason = runtime.ReasonCommandNotFound
	case handshake.CauseNotExecutable:
		e.Reason = runtime.ReasonCommandNotExecutable
	case handshake.CauseFormat:
		e.Reason = runtime.ReasonWrongArchitecture
	case handshake.CauseWorkingDir:
		e.Reason = runtime.ReasonWorkingDir
	default:
		e.Reason = runtime.ReasonExecFailed
		if errno == syscall.E2BIG {
			e.Reason = runtime.ReasonEnvironmentTooLarge
		}
	}
	return e
}

// permanent tells an error that the next try of the same gives again.
func permanent(errno syscall.Errno) bool {
	switch errno {
	case syscall.ENOENT, syscall.ENOEXEC, syscall.EACCES, syscall.EPERM, syscall.E2BIG, syscall.ENOTDIR,
		syscall.EISDIR, syscall.ELOOP, syscall.ENAMETOOLONG, syscall.EINVAL, syscall.ELIBBAD:
		return true
	default: // ENOMEM, EAGAIN, ETXTBSY, EIO, EINTR and what we don't know
		return false
	}
}

func (d *Driver) addStandby(id string, s *standby) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return errClosed
	}
	d.standbys[id] = s
	return nil
}

// take hands the standby over to one caller, nil if there is none.
func (d *Driver) take(id string) *standby {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.standbys[id]
	if s == nil || s.taken {
		return nil
	}
	s.taken = true
	return s
}

// giveBack ends what take began.
func (d *Driver) giveBack(s *standby) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s.taken = false
}

// disarm sees to it that no record that was made ahead is put over a newer one.
// d.recordMu is held.
func (d *Driver) disarm(id string) {
	d.mu.Lock()
	s := d.standbys[id]
	d.mu.Unlock()
	if s != nil {
		s.ahead = false
	}
}

// dropStandby lets go of the standby, if there is one: unless it has become the
// command, its init ends.
func (d *Driver) dropStandby(id string) {
	d.mu.Lock()
	s := d.standbys[id]
	delete(d.standbys, id)
	d.mu.Unlock()
	if s != nil {
		s.close()
	}
}

func (d *Driver) holds(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.standbys[id] != nil
}
