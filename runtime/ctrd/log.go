package ctrd

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	logSuffix = ".log"
	oldSuffix = ".1" // after logSuffix: what was in the log before
)

// logPath makes the workspace's log file, so that it exists with the right mode
// before a shim opens it.
func (d *Driver) logPath(workspace string) (string, error) {
	path := filepath.Join(d.logs, workspace+".log")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o640)
	if err != nil {
		return "", err
	}
	return path, f.Close()
}

// removeLogs removes the workspace's logs. None is no error.
func (d *Driver) removeLogs(workspace string) error {
	path := filepath.Join(d.logs, workspace+logSuffix)
	// In this order: see boundLog.
	for _, path := range []string{path, path + oldSuffix} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// BoundLogs looks at each workspace's log once and bounds it; see
// Config.MaxLogBytes. Nobody else does, for it is the shims that write them: it
// is to be called every few seconds. A log that can't be bounded keeps it from no
// other.
func (d *Driver) BoundLogs(ctx context.Context) error {
	d.logMu.Lock()
	defer d.logMu.Unlock()
	entries, err := os.ReadDir(d.logs)
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		workspace, ok := strings.CutSuffix(entry.Name(), logSuffix)
		if !ok || !workspaceID.MatchString(workspace) || !entry.Type().IsRegular() {
			continue
		}
		if ctx.Err() != nil {
			break
		}
		errs = append(errs, boundLog(ctx, filepath.Join(d.logs, entry.Name()), d.cfg.MaxLogBytes))
	}
	return errors.Join(append(errs, ctx.Err())...)
}

// boundTries is how often boundLog follows a log that grows while it is copied.
const boundTries = 16

// boundLog moves what is in a log that is longer than limit to the older one,
// the newest limit bytes of it and, twice that at most, what comes meanwhile.
// The shims that write it have the file open for appending, so it is copied and
// emptied, and they go on at its start. What they write between the last look at
// its end and the truncation is lost: microseconds of output, unless they write
// faster than it can be copied.
//
// The workspace may be removed meanwhile. Its log goes first and the older one
// next: when the log is still there once the older one was made, the removal takes
// that too, and else it is removed here.
func boundLog(ctx context.Context, path string, limit int64) error {
	log, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer log.Close()
	return bound(ctx, log, path, limit)
}

func bound(ctx context.Context, log *os.File, path string, limit int64) error {
	end, err := size(log)
	if err != nil || end <= limit {
		return err
	}
	old, err := os.OpenFile(path+oldSuffix, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|unix.O_NOFOLLOW, 0o640)
	if err != nil {
		return err
	}
	err = copyEnd(ctx, old, log, end, limit)
	if err := errors.Join(err, old.Close()); err != nil {
		return err
	}
	if removed, err := differ(path, log); err != nil {
		return err
	} else if removed {
		if err := os.Remove(path + oldSuffix); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	return log.Truncate(0)
}

// differ tells whether the file is not the one at the path, or none is there.
func differ(path string, file *os.File) (bool, error) {
	there, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return true, nil
	} else if err != nil {
		return false, err
	}
	open, err := file.Stat()
	return !os.SameFile(there, open), err
}

// copyEnd copies the newest bytes of a log, whose end was at end, and what comes
// meanwhile.
func copyEnd(ctx context.Context, old, log *os.File, end, limit int64) error {
	from := end - limit
	written := int64(0)
	for range boundTries {
		if end-from > limit || written+end-from > 2*limit {
			// It grows so fast that what was copied is not the newest any more.
			if err := old.Truncate(0); err != nil {
				return err
			}
			from, written = end-limit, 0
		}
		n, err := io.Copy(io.NewOffsetWriter(old, written), &boundReader{ctx, io.NewSectionReader(log, from, end-from)})
		if err != nil {
			return err
		}
		from, written = from+n, written+n
		if end, err = size(log); err != nil || end <= from {
			return err
		}
	}
	return nil
}

// boundReader reads until its context ends.
type boundReader struct {
	ctx context.Context
	io.Reader
}

func (r *boundReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

func size(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}
