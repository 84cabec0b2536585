package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// PanicError is a panic inside a transaction, which was rolled back. It is
// internal. One that damage of the file has caused is an ErrDamaged.
type PanicError struct {
	Value any
	Stack []byte
	// Damage says in a sentence what the file's damage is; empty: the panic has
	// another cause.
	Damage string
}

func (e *PanicError) Error() string {
	if e.Damage != "" {
		return e.Damage
	}
	return fmt.Sprintf("store: panic: %v", e.Value)
}

// Is reports that damage is an ErrDamaged.
func (e *PanicError) Is(target error) bool { return target == ErrDamaged && e.Damage != "" }

// guard runs f and turns a panic into an error: bbolt panics on damaged pages.
// A damaged page can also point outside of the mapped file, or the disk can fail
// to give a page; that fault, which would end the process, becomes a panic as
// well.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = &PanicError{Value: p, Stack: debug.Stack(), Damage: damage(p, panicOrigin())}
		}
	}()
	return f()
}

// parallel runs f, guarded, in a goroutine of its own. The caller calls wait, which
// returns what f has.
func parallel(f func() error) (wait func() error) {
	done := make(chan error, 1)
	go func() { done <- guard(f) }()
	return func() error { return <-done }
}

// damage returns what a panic says of the file, or nothing.
func damage(p any, origin string) string {
	var fault interface {
		error
		Addr() uintptr
	}
	err, _ := p.(error)
	switch {
	case errors.As(err, &fault) && fault.Addr() >= uintptr(os.Getpagesize()):
		return "the database can't be read: the file was cut off, or the disk fails"
	case errors.As(err, &fault): // nil
		return ""
	case strings.HasPrefix(origin, "go.etcd.io/bbolt"):
		return fmt.Sprintf("the database is damaged (%s)", inShort(p))
	}
	return ""
}

// inShort is what bbolt says, without its word for how it found out.
func inShort(why any) string {
	return strings.TrimPrefix(strings.TrimPrefix(fmt.Sprint(why), "panic: "), "assertion failed: ")
}

// panicOrigin returns the function that has panicked; it is called by the
// deferred function that recovers.
func panicOrigin() string {
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(0, pcs)])
	for paniced := false; ; {
		frame, more := frames.Next()
		switch {
		case frame.Function == "runtime.gopanic" || frame.Function == "runtime.sigpanic":
			paniced = true
		case paniced && !strings.HasPrefix(frame.Function, "runtime."):
			return frame.Function
		}
		if !more {
			return ""
		}
	}
}

// limits are what the store still does once its file was found to be so damaged
// that bbolt can't go on.
type limits struct {
	mu sync.Mutex
	// reading and writing are why not; nil: it does.
	reading, writing error
	// stuck: a panic has left a lock of bbolt's held for ever.
	stuck bool
	// txid is the newest transaction: bbolt must begin with no older one.
	txid int
}

// begin begins a transaction. A panic of bbolt in there leaves its locks held,
// and whoever came next would wait for ever: so there is none after it.
//
// There is none either once the page that names the newest commit is damaged:
// bbolt would go on from the commit before, whose pages may be in use again.
func (s *Store) begin(writable bool) (tx *bolt.Tx, err error) {
	l := &s.limits
	l.mu.Lock() // nobody waits longer than on bbolt's own lock
	defer l.mu.Unlock()
	if l.reading != nil {
		return nil, l.reading
	}
	if writable && l.writing != nil {
		return nil, l.writing
	}
	err = guard(func() error { tx, err = s.db.Begin(writable); return err })
	var paniced *PanicError
	switch {
	case errors.As(err, &paniced):
		l.stuck = true
	case err == nil && (tx.ID() < l.txid || writable && tx.ID() == l.txid):
		err = &PanicError{Damage: "the database is damaged (the page of the newest commit)"}
		_ = tx.Rollback()
	case !errors.Is(err, berrors.ErrInvalidMapping):
		return tx, err
	}
	err = s.giveUp(err)
	l.reading, l.writing = err, err
	return nil, err
}

// committed takes note of the newest transaction.
func (s *Store) committed(txid int) {
	s.limits.mu.Lock()
	defer s.limits.mu.Unlock()
	s.limits.txid = txid
}

// useFile has another file in use. It reports whether the one before is stuck.
func (s *Store) useFile(db *bolt.DB, file *os.File) (stuck bool) {
	l := &s.limits
	l.mu.Lock()
	defer l.mu.Unlock()
	var txid int
	if err := guard(func() error { return db.View(func(tx *bolt.Tx) error { txid = tx.ID(); return nil }) }); err != nil {
		s.cfg.Logger.Error("the compacted database can't be read", "error", err)
	}
	stuck, l.stuck = l.stuck, false
	s.db, s.file, l.txid = db, file, txid
	return stuck
}

// stopWriting lets nothing be written any more: bbolt has panicked on its way,
// and no longer knows which pages are free.
func (s *Store) stopWriting(err error) error {
	s.limits.mu.Lock()
	defer s.limits.mu.Unlock()
	err = s.giveUp(err)
	s.limits.writing = err
	return err
}

func (s *Store) giveUp(err error) error {
	err = fmt.Errorf("database %s can't be used any more, restart to have it checked: %w", s.cfg.Path, err)
	s.cfg.Logger.Error(err.Error())
	return err
}

// rollback ends a transaction; one that has ended already is fine.
func (s *Store) rollback(tx *bolt.Tx) {
	err := guard(tx.Rollback)
	var paniced *PanicError
	if errors.As(err, &paniced) {
		_ = s.stopWriting(err)
		s.limits.mu.Lock()
		s.limits.stuck = true
		s.limits.mu.Unlock()
	}
}

// close closes the database. With bbolt's locks held for ever only the file can
// be closed.
func (s *Store) close() error {
	s.limits.mu.Lock()
	stuck := s.limits.stuck
	s.limits.mu.Unlock()
	if stuck {
		return s.file.Close()
	}
	return guard(s.db.Close)
}

// view runs f in a read transaction of its own.
func (s *Store) view(f func(*bolt.Tx) error) error {
	tx, err := s.begin(false)
	if err != nil {
		return translate(err)
	}
	defer s.rollback(tx)
	return translate(guard(func() error { return f(tx) }))
}

// checkFile returns an error when the file is no longer the one that was opened:
// what is written to it would be lost with the next start.
func (s *Store) checkFile() error {
	opened, err := s.file.Stat()
	if err != nil {
		return err
	}
	named, err := os.Stat(s.cfg.Path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(opened, named) {
		return fmt.Errorf("database %s was removed or replaced while it is in use: nothing is written until it is back", s.cfg.Path)
	}
	return err
}

// settle makes a commit in doubt durable. The disk has failed to sync the page
// that makes it count, and the kernel tells of that only once: it takes the page
// for written now. Were a later commit to use what this one has set free, and the
// power to fail before its end, neither would be whole. So that page is written
// again first. (If it is lost already begin notices.)
func (s *Store) settle() error {
	metas := make([]byte, 2*s.pageSize)
	if _, err := s.file.ReadAt(metas, 0); err != nil {
		return err
	}
	if _, err := s.file.WriteAt(metas, 0); err != nil {
		return err
	}
	if err := s.file.Sync(); err != nil {
		return err
	}
	return nil
}

// checkOpenFile checks the file's pages before bbolt sees them, under the lock
// that bbolt takes as well.
func checkOpenFile(cfg *Config) error {
	f, err := os.Open(cfg.Path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if err := lockShared(f); err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	torn, err := checkPages(f, info.Size())
	if torn && err == nil {
		cfg.Logger.Warn("one of the database's two first pages is torn, as by a power failure: the commit that wrote it is not there", "database", cfg.Path)
	}
	return err
}

// lockShared waits for another process to let go of the file, for as long as
// bbolt would.
func lockShared(f *os.File) error {
	deadline := time.After(lockTimeout)
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
		if err == nil || !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		select {
		case <-time.After(lockTimeout / 20):
		case <-deadline:
			return berrors.ErrTimeout
		}
	}
}
