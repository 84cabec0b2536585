package ctrd

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

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
	d.logMu.Lock() // no older one appears behind our back
	defer d.logMu.Unlock()
	path := filepath.Join(d.logs, workspace+logSuffix)
	for _, path := range []string{path + oldSuffix, path} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// watchLogs bounds the logs until the driver is closed. Nobody else does: it is
// the shims that write them.
func (d *Driver) watchLogs() {
	tick := time.NewTicker(d.cfg.LogInterval)
	defer tick.Stop()
	for {
		if err := d.boundLogs(d.ctx); err != nil && d.ctx.Err() == nil {
			d.log.Warn("a workspace's log can't be bounded", "error", err)
		}
		select {
		case <-tick.C:
		case <-d.ctx.Done():
			return
		}
	}
}

// boundLogs looks at each log once.
func (d *Driver) boundLogs(ctx context.Context) error {
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
		d.logMu.Lock()
		err := boundLog(filepath.Join(d.logs, entry.Name()), d.cfg.MaxLogBytes)
		d.logMu.Unlock()
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// boundTries is how often boundLog follows a log that grows while it is copied.
const boundTries = 16

// boundLog moves what is in a log that is longer than limit to the older one,
// the newest limit bytes of it and, twice that at most, what comes meanwhile.
// The shims that write it have the file open for appending, so it is copied and
// emptied, and they go on at its start. What they write between the last look at
// its end and the truncation is lost: microseconds of output, unless they write
// faster than it can be copied.
func boundLog(path string, limit int64) error {
	log, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer log.Close()
	end, err := size(log)
	if err != nil || end <= limit {
		return err
	}
	old, err := os.OpenFile(path+oldSuffix, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|unix.O_NOFOLLOW, 0o640)
	if err != nil {
		return err
	}
	err = copyEnd(old, log, end, limit)
	if err := errors.Join(err, old.Close()); err != nil {
		return err
	}
	return log.Truncate(0)
}

// copyEnd copies the newest bytes of a log, whose end was at end, and what comes
// meanwhile.
func copyEnd(old, log *os.File, end, limit int64) error {
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
		n, err := io.Copy(io.NewOffsetWriter(old, written), io.NewSectionReader(log, from, end-from))
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

func size(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}
