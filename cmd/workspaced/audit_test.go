package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

var auditLineForm = regexp.MustCompile(`^\{"sequence":(\d+),"hash":"([0-9a-f]{64})",(.*)$`)

// checkAuditLines checks lines as anybody can who has them: each hash is over the
// one before it, the sequence and the rest of the line. It returns the lines.
func checkAuditLines(t *testing.T, copied string, before []byte) []string {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(copied, "\n"), "\n")
	for _, line := range lines {
		m := auditLineForm.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("not a line of the audit log: %q", line)
		}
		var sequence uint64
		if _, err := fmt.Sscan(m[1], &sequence); err != nil {
			t.Fatal(err)
		}
		hash := sha256.Sum256(slices.Concat(before, binary.BigEndian.AppendUint64(nil, sequence), []byte("{"+m[3])))
		if hex.EncodeToString(hash[:]) != m[2] {
			t.Errorf("the hash of %q is not that of what is there", line)
		}
		before = hash[:]
	}
	return lines
}

// auditStore is a store with so many entries.
func auditStore(t *testing.T, dir string) *store.Store {
	t.Helper()
	kek, err := seal.LoadOrCreate(filepath.Join(dir, "key"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(store.Config{Path: filepath.Join(dir, "db"), KEK: kek, Audit: store.AuditPolicy{MaxBytes: 1 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func addAudit(t *testing.T, s *store.Store, n int) {
	t.Helper()
	for range n {
		s.AuditLater(store.AuditEntry{Method: "m", Resource: fmt.Sprint(time.Now().UnixNano()), Code: "OK"})
		if err := s.FlushAudit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// copyNow copies everything that is there.
func copyNow(t *testing.T, s *store.Store, sink auditSink) error {
	t.Helper()
	c := &auditCopier{store: s, sink: sink, log: slog.New(slog.DiscardHandler)}
	for {
		if more, err := c.copy(); err != nil || !more {
			return err
		}
	}
}

// Each entry comes once, in order, also after a restart, whatever becomes of the
// file; what could not be written comes later.
func TestAuditCopy_File(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.log")
	s := auditStore(t, dir)
	addAudit(t, s, 3)
	sink := &fileSink{path: path}
	want := func(file string, lines int) {
		t.Helper()
		if got := strings.Count(read(t, file), "\n"); got != lines {
			t.Errorf("%s has %d lines, want %d", file, got, lines)
		}
	}
	copied := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	copied(copyNow(t, s, sink))
	copied(copyNow(t, s, sink))
	want(path, 3)
	if got := mode(t, path); got != 0o600 {
		t.Errorf("mode %o", got)
	}

	// Rotated: the old name's file gets no more.
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	addAudit(t, s, 2)
	copied(copyNow(t, s, sink))
	want(path+".1", 3)
	want(path, 2)

	// A link or a FIFO in its place is not written to, and nothing is lost by it.
	for _, replace := range []func() error{
		func() error { return os.Symlink(filepath.Join(dir, "elsewhere"), path) },
		func() error { return syscall.Mkfifo(path, 0o600) },
		func() error { return os.Mkdir(path, 0o700) },
	} {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		if err := replace(); err != nil {
			t.Fatal(err)
		}
		addAudit(t, s, 1)
		if err := copyNow(t, s, sink); err == nil {
			t.Error("it was written")
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if exists(filepath.Join(dir, "elsewhere")) {
		t.Error("it was written through a link")
	}

	// After a restart it goes on where it was.
	copied(s.Close())
	sink.close()
	s = auditStore(t, dir)
	sink = &fileSink{path: path}
	copied(copyNow(t, s, sink))
	want(path, 3)
	addAudit(t, s, 1)
	copied(copyNow(t, s, sink))
	copied(s.Close())
	s = auditStore(t, dir)
	copied(copyNow(t, s, sink))
	want(path, 4)
	copied(s.Close())
	sink.close()
	checkAuditLines(t, read(t, path+".1"), make([]byte, 32))
}

// A line that was cut off does not run into the next one.
func TestAuditCopy_TornLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	sink := &fileSink{path: path, torn: true}
	defer sink.close()
	for _, line := range []string{"a\n", "b\n"} {
		if err := sink.write([]byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, path); got != "\na\nb\n" {
		t.Errorf("got %q", got)
	}
}

// The loop copies what is written while it runs, and what is left when it ends.
func TestAuditCopy_Loop(t *testing.T) {
	dir := t.TempDir()
	s := auditStore(t, dir)
	path := filepath.Join(dir, "audit.log")
	c := &auditCopier{store: s, sink: &fileSink{path: path}, log: slog.New(slog.DiscardHandler)}
	addAudit(t, s, 600) // more than a batch
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- c.run(ctx, func() {}) }()
	addAudit(t, s, 5)
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if lines := checkAuditLines(t, read(t, path), make([]byte, 32)); len(lines) != 605 {
		t.Errorf("%d lines", len(lines))
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestAuditCopy_Syslog(t *testing.T) {
	dir := t.TempDir()
	address := filepath.Join(dir, "log")
	sink := &syslogSink{address: address}
	if err := sink.write([]byte("x\n")); err == nil {
		t.Error("it was written to nobody")
	}
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if err := sink.write([]byte("{\"a\":1}\n{\"a\":2}\n")); err != nil {
		t.Fatal(err)
	}
	defer sink.close()
	for i := range 2 {
		b := make([]byte, 1000)
		n, err := l.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf(" workspaced[%d]: {\"a\":%d}", os.Getpid(), i+1); !bytes.HasPrefix(b, []byte("<86>")) || !bytes.HasSuffix(b[:n], []byte(want)) {
			t.Errorf("got %q", b[:n])
		}
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
