package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/store"
)

const (
	// auditVerifyInterval is how often the whole audit log is verified.
	auditVerifyInterval = time.Hour
	// auditBeat is how often the loop says that all is well, as found last.
	auditBeat = time.Minute
	// auditCopyPause is how much time is between two batches of the copy: what is
	// written meanwhile comes together, with one fsync.
	auditCopyPause = time.Second
	auditCopyBatch = 500
	// syslogTimeout bounds the wait for a system log that does not read.
	syslogTimeout = 5 * time.Second
)

// tendAudit verifies and prunes the audit log, and has a heartbeat as long as it is
// what was written. When it is not, the loop is stale, health and metrics say so,
// and the daemon goes on: one that does not run at all serves nobody, and keeps no
// log either.
func tendAudit(api *server.Server) func(ctx context.Context, beat func()) error {
	return func(ctx context.Context, beat func()) error {
		ticker := time.NewTicker(auditBeat)
		defer ticker.Stop()
		for {
			begin := time.Now()
			if err := api.TendAudit(ctx); err != nil {
				return err
			}
			for time.Since(begin) < auditVerifyInterval {
				if api.AuditIntact() == nil {
					beat()
				}
				select {
				case <-ticker.C:
				case <-ctx.Done():
					return nil
				}
			}
		}
	}
}

// auditSink takes lines that end with a newline. They are kept when write returns
// without an error.
type auditSink interface {
	write(lines []byte) error
	close()
}

// auditCopier copies the audit log to somewhere else, an entry a line, as JSON. It
// reads what the store has, so that nothing waits in memory: a copy that can't be
// written now is written later, in the same order, unless the entries were removed
// by then. After a crash some lines may come twice; the sequence tells.
type auditCopier struct {
	store *store.Store
	sink  auditSink
	log   *slog.Logger
}

func (c *auditCopier) run(ctx context.Context, _ func()) error {
	defer c.sink.close()
	for {
		for more := true; more; {
			var err error
			if more, err = c.copy(); err != nil {
				return fmt.Errorf("audit_copy: %w", err)
			}
		}
		select {
		case <-c.store.AuditWritten():
		case <-ctx.Done():
			_, err := c.copy() // what has come since
			return err
		}
		select {
		case <-time.After(auditCopyPause):
		case <-ctx.Done():
		}
	}
}

// copy copies the next entries, and reports whether there may be more.
func (c *auditCopier) copy() (more bool, err error) {
	after := c.store.AuditCopied()
	entries, last, more, err := c.store.AuditEntries(after, false, auditCopyBatch, nil)
	if err != nil || len(entries) == 0 {
		return false, err
	}
	if first := entries[0].Sequence; after > 0 && first != after+1 {
		c.log.Warn("entries of the audit log were removed before they were copied", "from", after+1, "to", first-1)
	}
	var lines bytes.Buffer
	for i := range entries {
		line, err := auditLine(&entries[i])
		if err != nil {
			return false, err
		}
		lines.Write(line)
	}
	if err := c.sink.write(lines.Bytes()); err != nil {
		return false, err
	}
	c.store.SetAuditCopied(last)
	return more, nil
}

// auditLine is an entry with its place in the log. Without the two fields that are
// put before it the object is what the hash is over, byte for byte.
func auditLine(e *store.AuditEntry) ([]byte, error) {
	entry, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "{\"sequence\":%d,\"hash\":\"%x\",%s\n", e.Sequence, e.Hash, entry[1:]), nil
}

// newAuditSink makes the sink of a setting: a file's path, or syslog.
func newAuditSink(setting string) auditSink {
	if setting == auditSyslog {
		return &syslogSink{address: "/dev/log"}
	}
	return &fileSink{path: setting}
}

const auditSyslog = "syslog"

// fileSink appends to a file, which others may rotate: it is opened anew when
// another one, or none, has its name.
type fileSink struct {
	path string
	file *os.File // nil: not open
	torn bool     // the last line may be half of one
}

func (s *fileSink) write(lines []byte) (err error) {
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if err := s.open(); err != nil {
		return err
	}
	if s.torn {
		lines = append([]byte("\n"), lines...)
	}
	s.torn = true
	if _, err := s.file.Write(lines); err != nil {
		return err
	}
	s.torn = false
	return s.file.Sync()
}

func (s *fileSink) open() error {
	if s.file != nil {
		opened, err := s.file.Stat()
		if err != nil {
			return err
		}
		if named, err := os.Lstat(s.path); err == nil && os.SameFile(opened, named) {
			return nil
		}
		s.close()
	}
	// Not by a link that somebody has put there, and not waiting for a FIFO's reader.
	f, err := os.OpenFile(s.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", s.path)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	s.file = f
	return nil
}

func (s *fileSink) close() {
	if s.file != nil {
		_ = s.file.Close() // it was synced
		s.file = nil
	}
}

// syslogSink sends a message a line to the system's log (RFC 3164, facility
// authpriv). The standard library's package has no deadlines, and would wait for a
// log that does not read for ever.
type syslogSink struct {
	address string
	conn    net.Conn // nil: not connected
}

// authprivInfo is the priority of facility authpriv and severity info.
const authprivInfo = 10<<3 | 6

func (s *syslogSink) write(lines []byte) (err error) {
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.conn == nil {
		if s.conn, err = net.DialTimeout("unixgram", s.address, syslogTimeout); err != nil {
			return err
		}
	}
	for line := range bytes.Lines(lines) {
		message := fmt.Appendf(nil, "<%d>%s workspaced[%d]: %s", authprivInfo, time.Now().Format(time.Stamp), os.Getpid(), bytes.TrimSuffix(line, []byte("\n")))
		if err := s.conn.SetWriteDeadline(time.Now().Add(syslogTimeout)); err != nil {
			return err
		}
		if _, err := s.conn.Write(message); err != nil {
			return err
		}
	}
	return nil
}

func (s *syslogSink) close() {
	if s.conn != nil {
		_ = s.conn.Close() // datagrams: nothing is left to be sent
		s.conn = nil
	}
}
