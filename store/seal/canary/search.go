package canary

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/klauspost/compress/zstd"
)

const (
	chunk = 256 << 10
	// overlap is more than any form of a value takes.
	overlap = 512
	// maxDepth is how many archives are opened one inside the other.
	maxDepth = 5
)

// Search looks for the values of a set, and remembers what it has found. What has
// not changed since it was last looked at is not looked at again. It is for one
// goroutine.
type Search struct {
	// Set has the values.
	Set *Set
	// Skip, if not nil, tells what of a directory is left out.
	Skip func(path string, entry fs.DirEntry) bool

	// Hits are what was found, each once.
	Hits []Hit
	// Files and Bytes count what was searched, Bytes what was unpacked as well.
	Files, Bytes int64

	known map[Hit]bool
	done  map[version]bool
}

// version is one content of one file.
type version struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

// Data searches data; where is what hits call it.
func (s *Search) Data(where string, data []byte) {
	m := &matcher{s: s, where: where}
	s.Bytes += int64(len(data))
	m.find(data, len(data))
}

// Dir searches all regular files below a directory, or one file. What vanishes
// meanwhile is not there.
func (s *Search) Dir(dir string) error {
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case s.Skip != nil && s.Skip(path, entry):
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		// Names can tell something too.
		s.Data("the name of "+path, []byte(filepath.Base(path)))
		if entry.Type()&fs.ModeSymlink != 0 {
			if target, err := os.Readlink(path); err == nil {
				s.Data("the link "+path, []byte(target))
			}
		}
		if !entry.Type().IsRegular() {
			return nil
		}
		if err := s.File(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
}

// File searches a file, and what is packed in it.
func (s *Search) File(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	// Files of /proc have no size, and another content whenever they are read.
	st := info.Sys().(*syscall.Stat_t)
	v := version{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}
	if v.size > 0 && s.done[v] {
		return nil
	}
	s.Files++
	if err := s.Reader(path, f); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if s.done == nil {
		s.done = map[version]bool{}
	}
	s.done[v] = true
	return nil
}

// Reader searches what r yields, and what is packed in it, to its end.
func (s *Search) Reader(where string, r io.Reader) error { return s.read(where, r, 0) }

func (s *Search) read(where string, r io.Reader, depth int) error {
	m := &matcher{s: s, where: where}
	// The head tells what it is.
	n, err := io.ReadFull(r, m.room(headLen))
	m.wrote(n)
	if err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
		if open := unpacker(m.buf); open != nil && depth < maxDepth {
			packed := io.MultiReader(bytes.NewReader(bytes.Clone(m.buf)), io.TeeReader(r, m))
			open(s, where, packed, depth+1)
			// What is left because the unpacker is at its end, or made no sense of it.
		}
	}
	for err == nil {
		n, err = r.Read(m.room(chunk))
		m.wrote(n)
	}
	m.find(m.buf, len(m.buf))
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// headLen is how much of a file tells what it is.
const headLen = 512

// unpacker returns what searches the contents of something that begins with head;
// nil: nothing is packed in it. Something broken is searched as far as it can be
// unpacked: whoever writes it may not be done.
func unpacker(head []byte) func(s *Search, where string, r io.Reader, depth int) {
	switch {
	case bytes.HasPrefix(head, []byte("\x1f\x8b")):
		return (*Search).gunzip
	case bytes.HasPrefix(head, []byte("\x28\xb5\x2f\xfd")):
		return (*Search).unzstd
	case len(head) == headLen && string(head[257:262]) == "ustar":
		return (*Search).untar
	}
	return nil
}

func (s *Search) gunzip(where string, r io.Reader, depth int) {
	if z, err := gzip.NewReader(r); err == nil {
		_ = s.read(where+" > gzip", z, depth)
	}
}

func (s *Search) unzstd(where string, r io.Reader, depth int) {
	if z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1)); err == nil {
		_ = s.read(where+" > zstd", z, depth)
		z.Close()
	}
}

// untar finds little that is not found in the whole: what its files have packed.
func (s *Search) untar(where string, r io.Reader, depth int) {
	for t := tar.NewReader(r); ; {
		header, err := t.Next()
		if err != nil {
			return
		}
		if err := s.read(where+" > tar: "+header.Name, t, depth); err != nil {
			return
		}
	}
}

// matcher finds what it gets in pieces.
type matcher struct {
	s     *Search
	where string
	buf   []byte // that nothing was looked for in yet
}

// room returns a place for the next n bytes; wrote says how many there are.
func (m *matcher) room(n int) []byte {
	m.buf = slices.Grow(m.buf, n)
	return m.buf[len(m.buf):][:n]
}

func (m *matcher) wrote(n int) {
	m.s.Bytes += int64(n)
	m.buf = m.buf[:len(m.buf)+n]
	if len(m.buf) >= chunk {
		first := len(m.buf) - overlap
		m.find(m.buf, first)
		m.buf = append(m.buf[:0], m.buf[first:]...)
	}
}

// Write never fails.
func (m *matcher) Write(p []byte) (int, error) {
	m.wrote(copy(m.room(len(p)), p))
	return len(p), nil
}

// find looks for what begins in the first bytes of data.
func (m *matcher) find(data []byte, first int) {
	m.s.Set.find(data, first, func(h Hit) {
		h.Where = m.where
		if m.s.known[h] {
			return
		}
		if m.s.known == nil {
			m.s.known = map[Hit]bool{}
		}
		m.s.known[h] = true
		m.s.Hits = append(m.s.Hits, h)
	})
}
