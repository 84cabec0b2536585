package main

import (
	"bytes"
	"encoding/binary"
	"runtime"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// Programs come from images of anybody: whatever their bytes are, a look at them
// ends soon, with an interpreter's name or a reason, or lets execve decide.
func FuzzInspect(f *testing.F) {
	elf := func(edit func(b []byte)) []byte {
		b := make([]byte, 64+56, 256)
		copy(b, "\x7fELF\x02\x01\x01")
		binary.LittleEndian.PutUint16(b[18:], machines[runtime.GOARCH][0])
		binary.LittleEndian.PutUint64(b[32:], 64) // program headers' offset
		binary.LittleEndian.PutUint16(b[54:], 56) // their size
		binary.LittleEndian.PutUint16(b[56:], 1)  // their count
		binary.LittleEndian.PutUint32(b[64:], 3)  // PT_INTERP
		binary.LittleEndian.PutUint64(b[72:], 64+56)
		binary.LittleEndian.PutUint64(b[96:], 10)
		b = append(b, "/lib/ld.so"...)
		edit(b)
		return b
	}
	for _, b := range [][]byte{
		nil, []byte("#!"), []byte("#!/bin/sh -e\n"), []byte("#! \t/bin/sh"), []byte("#!\xff\n"), []byte("echo"), []byte("\x7fELF"),
		elf(func([]byte) {}),
		elf(func(b []byte) { b[4] = 1 }),                                          // 32 bits
		elf(func(b []byte) { b[5] = 2 }),                                          // big endian
		elf(func(b []byte) { b[18] = 8 }),                                         // another machine
		elf(func(b []byte) { binary.LittleEndian.PutUint16(b[54:], 0) }),          // headers of no size
		elf(func(b []byte) { binary.LittleEndian.PutUint16(b[56:], 0xffff) }),     // so many
		elf(func(b []byte) { binary.LittleEndian.PutUint64(b[32:], ^uint64(0)) }), // nowhere
		elf(func(b []byte) { binary.LittleEndian.PutUint64(b[72:], 1<<63) }),      // a name nowhere
		elf(func(b []byte) { binary.LittleEndian.PutUint64(b[96:], 1<<40) }),      // so long
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := &countingReader{Reader: bytes.NewReader(data)}
		interpreter, failure := inspect("/command", r)
		if failure != nil && (interpreter != "" || failure.cause == handshake.CauseNone || !utf8.ValidString(failure.message)) {
			t.Fatalf("%q: interpreter %q beside the failure %+v", data, interpreter, failure)
		}
		if len(interpreter) > 4096 || strings.ContainsAny(interpreter, "\n") && bytes.HasPrefix(data, []byte("#!")) {
			t.Fatalf("%q: interpreter %q", data, interpreter)
		}
		if limit := 256 + 0x10000*56 + 4096; r.read > limit {
			t.Fatalf("%d bytes were read", r.read)
		}
	})
}

type countingReader struct {
	*bytes.Reader
	read int
}

func (r *countingReader) ReadAt(p []byte, at int64) (int, error) {
	r.read += len(p)
	return r.Reader.ReadAt(p, at)
}
