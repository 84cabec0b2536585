package store

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	berrors "go.etcd.io/bbolt/errors"
)

// Errors of Open; they come as *OpenError. ErrDamaged is also what was found of
// the file while it is open: a *RowError or *PanicError.
var (
	// ErrLocked: another process has the database open.
	ErrLocked = errors.New("database is in use")
	// ErrDamaged: the file is no sound database.
	ErrDamaged = errors.New("database is damaged")
	// ErrWrongKey: the database was sealed with another key.
	ErrWrongKey = errors.New("wrong key")
	// ErrKEK: what keeps the key does not answer, or refuses.
	ErrKEK = errors.New("key can't be had")
	// ErrSchema: a newer version of the program wrote the database.
	ErrSchema = errors.New("unknown schema version")
)

// ErrReadOnly: nothing was written, the file system does not let itself be
// written to any more; reading goes on.
var ErrReadOnly = errors.New("file system is read-only")

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
	Err    error // wraps ErrLocked, ErrDamaged, ErrWrongKey, ErrKEK (and what the KEK said) or ErrSchema
	Detail string
}

func (e *OpenError) Error() string { return fmt.Sprintf("database %s %s", e.Path, e.Detail) }

// Unwrap returns Err.
func (e *OpenError) Unwrap() error { return e.Err }

// diskErrors tell what a disk's errors mean, in the order in which they are
// looked for. They are told apart by text too: bbolt flattens some of its errors.
var diskErrors = []struct {
	errno syscall.Errno
	means error
}{
	{syscall.ENOSPC, ErrDiskFull}, {syscall.EDQUOT, ErrDiskFull}, {syscall.EFBIG, ErrDiskFull},
	{syscall.EROFS, ErrReadOnly},
}

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
	for _, e := range diskErrors {
		if errors.Is(err, e.errno) || strings.HasSuffix(err.Error(), e.errno.Error()) {
			return fmt.Errorf("%w: %w", e.means, err)
		}
	}
	return err
}
