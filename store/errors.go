package store

import (
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"syscall"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// Errors of Open; they come as *OpenError.
var (
	// ErrLocked: another process has the database open.
	ErrLocked = errors.New("database is in use")
	// ErrDamaged: the file is no sound database.
	ErrDamaged = errors.New("database is damaged")
	// ErrWrongKey: the database was sealed with another key.
	ErrWrongKey = errors.New("wrong key")
	// ErrSchema: a newer version of the program wrote the database.
	ErrSchema = errors.New("unknown schema version")
)

// ErrInDoubt: nobody knows whether the change is made, or lasts: the disk failed
// at the very end of a commit, or did not answer before the caller's deadline.
// It comes together with what happened. Who repeats the change under its request
// id gets the answer, or makes it.
var ErrInDoubt = errors.New("the change is in doubt")

// ErrCompacted: the change feed no longer tells what was removed since that
// revision. Read everything again.
var ErrCompacted = errors.New("revision is too old for the change feed")

// OpenError says in one sentence why a database is not opened.
type OpenError struct {
	Path   string
	Err    error // ErrLocked, ErrDamaged, ErrWrongKey, ErrSchema
	Detail string
}

func (e *OpenError) Error() string { return fmt.Sprintf("database %s %s", e.Path, e.Detail) }

// Unwrap returns Err.
func (e *OpenError) Unwrap() error { return e.Err }

// PanicError is a panic inside a transaction, which was rolled back. It is
// internal.
type PanicError struct {
	Value any
	Stack []byte
}

func (e *PanicError) Error() string { return fmt.Sprintf("store: panic: %v", e.Value) }

// guard runs f and turns a panic into an error: bbolt panics on damaged pages.
// A damaged page can also point outside of the mapped file; that fault, which
// would end the process, becomes a panic as well.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = &PanicError{Value: p, Stack: debug.Stack()}
		}
	}()
	return f()
}

// diskFullErrors are told apart by text too: bbolt flattens some of its errors.
var diskFullErrors = []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG}

// translate maps bbolt's errors to the store's.
func translate(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, berrors.ErrDatabaseNotOpen) {
		return ErrClosed
	}
	if errors.Is(err, ErrInDoubt) { // so it is not known that nothing was written
		return err
	}
	for _, full := range diskFullErrors {
		if errors.Is(err, full) || strings.HasSuffix(err.Error(), full.Error()) {
			return fmt.Errorf("%w: %w", ErrDiskFull, err)
		}
	}
	return err
}

// view runs f in a read transaction of its own.
func (s *Store) view(f func(*bolt.Tx) error) error {
	return translate(guard(func() error { return s.db.View(f) }))
}
