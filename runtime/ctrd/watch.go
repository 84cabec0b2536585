package ctrd

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
)

// Watch tells how an instance ended; see server/workspace.Runtime.
func (d *Driver) Watch(ctx context.Context, id string, ended func(runtime.Exit)) (stop func(), err error) {
	rec, err := d.findRecord(ctx, id)
	if err == nil && rec == nil {
		rec, err = d.recordOfTask(ctx, id)
	}
	if err != nil {
		return nil, failure(ctx, "watching the container", err)
	}
	if rec.Exit != nil {
		ended(*rec.Exit)
		return func() {}, nil
	}
	var p *process
	if rec.PID != 0 {
		if p, err = d.openProcess(ctx, rec.PID, rec.PIDStart); err != nil {
			return nil, failure(ctx, "watching the container", err)
		}
	}
	if p == nil {
		ended(d.exit(ctx, rec, nil))
		return func() {}, nil
	}
	w := &watch{uid: rec.WorkspaceUID, id: strings.Clone(id), process: p, ended: ended}
	watched := false
	defer func() { // also after a panic
		if !watched {
			d.watches.remove(w)
		}
	}()
	if err := d.step(ctx, stepExitWait, func(context.Context) error { return d.watches.add(w) }); err != nil {
		return nil, failure(ctx, "watching the container", err)
	}
	watched = true
	return func() { d.watches.remove(w) }, nil
}

// watchEnded finds out how a watched process ended and passes it on. Whatever goes
// wrong with that, who watches must look.
func (d *Driver) watchEnded(w *watch) {
	exit := runtime.Exit{Time: time.Now()}
	_ = d.guard("the watch of a container's end", func() error {
		rec := &record{ID: w.id}
		if w.uid != "" {
			now, err := d.readRecordOrNone(w.uid, w.id)
			if err != nil {
				return err
			}
			if now != nil {
				rec = now
			}
		}
		exit = d.exit(d.ctx, rec, w.process)
		return nil
	})
	w.process.close()
	w.ended(exit)
}

// watches tells when processes end. One goroutine waits for all of them, however
// many there are: their pidfds are in an epoll, which is itself a file that Go's
// poller waits for.
type watches struct {
	epoll   *os.File
	fd      int            // epoll's, valid as long as byFD is not nil
	told    func(*watch)   // called for each that ended, in a goroutine of its own
	running sync.WaitGroup // that one, and those

	mu   sync.Mutex
	byFD map[int]*watch // nil once closed
}

// watch is that of one process.
type watch struct {
	uid, id string // the instance's; uid is empty when it has no record
	process *process
	fd      int // the process's
	ended   func(runtime.Exit)
	telling sync.WaitGroup // the call of told
}

var errWatchesClosed = errors.New("the driver is closed")

func newWatches(told func(*watch)) (*watches, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // so that Go's poller takes it
		return nil, errors.Join(err, unix.Close(fd))
	}
	ws := &watches{epoll: os.NewFile(uintptr(fd), "epoll"), fd: fd, told: told, byFD: make(map[int]*watch)}
	conn, err := ws.epoll.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, ws.epoll.Close())
	}
	ws.running.Go(func() {
		events, n := make([]unix.EpollEvent, 128), 0
		for conn.Read(func(fd uintptr) bool {
			n = ready(int(fd), events)
			return n > 0
		}) == nil {
			for _, e := range events[:n] {
				ws.tell(int(e.Fd))
			}
		}
		ws.abandon()
	})
	return ws, nil
}

// ready asks an epoll without waiting.
func ready(epoll int, events []unix.EpollEvent) int {
	for {
		n, err := unix.EpollWait(epoll, events, 0)
		if !errors.Is(err, unix.EINTR) {
			return n
		}
	}
}

// add watches the process until it has ended, or remove.
func (ws *watches) add(w *watch) error {
	err := errWatchesClosed
	cerr := w.process.control(func(fd int) {
		ws.mu.Lock()
		defer ws.mu.Unlock()
		if ws.byFD == nil {
			return
		}
		event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
		err = os.NewSyscallError("epoll_ctl", unix.EpollCtl(ws.fd, unix.EPOLL_CTL_ADD, fd, &event))
		if err == nil {
			w.fd = fd
			ws.byFD[fd] = w
		}
	})
	return errors.Join(cerr, err)
}

// remove ends a watch. A call that tells of the end is over when it returns.
func (ws *watches) remove(w *watch) {
	ws.mu.Lock()
	watched := ws.byFD[w.fd] == w
	if watched {
		ws.forget(w)
	}
	ws.mu.Unlock()
	if !watched {
		w.telling.Wait()
	}
	w.process.close()
}

// forget takes a watch out, before its file is closed. The lock is held.
func (ws *watches) forget(w *watch) {
	delete(ws.byFD, w.fd)
	_ = unix.EpollCtl(ws.fd, unix.EPOLL_CTL_DEL, w.fd, nil) // it is there
}

// tell has the end of the process with that pidfd told, if it is still watched.
func (ws *watches) tell(fd int) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w := ws.byFD[fd]
	if w == nil || !readable(fd) { // the number may be another watch's by now
		return
	}
	ws.forget(w)
	ws.tellLater(w)
}

// tellLater has the end told. The lock is held, and w is forgotten.
func (ws *watches) tellLater(w *watch) {
	w.telling.Add(1)
	ws.running.Go(func() {
		defer w.telling.Done()
		ws.told(w)
	})
}

// abandon ends all watches when nobody waits for the epoll any more. Unless that
// is close's doing each is told, so that who watches looks, and finds that it can't
// watch again: nothing is missed in silence.
func (ws *watches) abandon() {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range ws.byFD {
		ws.tellLater(w)
	}
	ws.byFD = nil
}

// close ends all watches and waits for what is being told.
func (ws *watches) close() {
	ws.mu.Lock()
	left := ws.byFD
	ws.byFD = nil
	ws.mu.Unlock()
	ws.epoll.Close()
	for _, w := range left {
		w.process.close()
	}
	ws.running.Wait()
}
