package handshake

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"slices"
	"testing"
)

// frame is one of the magic, with a right checksum and a length that may lie.
func frame(magic string, length uint32, payload []byte) []byte {
	b := append([]byte(magic), version)
	b = binary.BigEndian.AppendUint32(b, length)
	sum := sha256.Sum256(payload)
	return append(append(b, sum[:]...), payload...)
}

// known fails unless the error is one that the readers promise for these bytes.
func known(t *testing.T, data []byte, err error) {
	t.Helper()
	if errors.Is(err, io.EOF) != (len(data) == 0) || !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, ErrFormat) {
		t.Fatalf("%d bytes give the error %v", len(data), err)
	}
}

// What the container's first process reads.
func FuzzReadGoAhead(f *testing.F) {
	one := goAhead(f, "A=1")
	f.Add([]byte{})
	f.Add(goAhead(f))
	f.Add(goAhead(f, "A=1", "B="))
	f.Add(one[:20])
	f.Add(one[:len(one)-1])
	f.Add(append(slices.Clone(one), one...))
	f.Add(frame("WSGO", 4, binary.BigEndian.AppendUint32(nil, 0xffffffff))) // so many strings
	f.Add(frame("WSGO", 8, []byte{0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff}))     // a string so long
	f.Add(frame("WSGO", MaxGoAhead, []byte{0, 0, 0, 0}))                    // a payload so long
	f.Add(frame("WSGO", MaxGoAhead+1, []byte{0, 0, 0, 0}))                  // and longer
	f.Add(frame("WSGO", 9, []byte{0, 0, 0, 1, 0, 0, 0, 0, 'x'}))            // a byte too many
	f.Add(frame("WSRS", 4, []byte{0, 0, 0, 0}))                             // the other direction's
	f.Add(append([]byte("WSGO\x02"), goAhead(f)[5:]...))                    // another version's
	f.Fuzz(func(t *testing.T, data []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		g, err := ReadGoAhead(bytes.NewReader(data))
		runtime.ReadMemStats(&after)
		if used := after.TotalAlloc - before.TotalAlloc; used > MaxGoAhead+16*uint64(len(data))+64<<10 {
			t.Fatalf("%d bytes take %d of memory", len(data), used)
		}
		if err != nil {
			known(t, data, err)
			return
		}
		// What was taken is exactly what those bytes say, all of them.
		again := goAhead(t, g.Env...)
		if !bytes.HasPrefix(data, again) {
			t.Fatalf("%q was taken as %q", data, g.Env)
		}
		if _, err := ReadGoAhead(bytes.NewReader(again[:len(again)-1])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut by a byte: %v", err)
		}
	})
}

// What is written is what is read, whatever the strings hold.
func FuzzGoAhead(f *testing.F) {
	f.Add([]byte("A=1\nB=2"))
	f.Add([]byte("\n\x00\n=\n\xff"))
	f.Add(bytes.Repeat([]byte("x"), 70<<10))
	f.Fuzz(func(t *testing.T, data []byte) {
		var env []string
		for line := range bytes.SplitSeq(data, []byte("\n")) {
			env = append(env, string(line))
		}
		r := bytes.NewReader(append(goAhead(t, env...), "rest"...))
		g, err := ReadGoAhead(r)
		if err != nil || !slices.Equal(g.Env, env) || r.Len() != len("rest") {
			t.Fatalf("%q is read as %q, %v, with %d bytes left", env, g.Env, err, r.Len())
		}
	})
}

// What the daemon reads: results, until the FIFO ends.
func FuzzReadResults(f *testing.F) {
	var stream []byte
	for _, r := range []Result{{Kind: Ready}, {Kind: Executing}, {Kind: Failed, Cause: CauseFormat, Errno: 2, Message: "no"}} {
		var b bytes.Buffer
		if err := WriteResult(&b, r); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
		stream = append(stream, b.Bytes()...)
	}
	f.Add([]byte{})
	f.Add(stream)
	f.Add(stream[:len(stream)-1])
	f.Add(append(slices.Clone(stream), stream...))
	f.Add(frame("WSRS", 5, []byte{1, 0, 0, 0, 0}))               // too short
	f.Add(frame("WSRS", 6, []byte{0, 0, 0, 0, 0, 0}))            // no kind
	f.Add(frame("WSRS", 6, []byte{3, 9, 0, 0, 0, 0}))            // no cause
	f.Add(frame("WSRS", maxResult+1, make([]byte, maxResult+1))) // too long
	f.Add(frame("WSRS", 0xffffffff, []byte{1, 0, 0, 0, 0, 0}))   // a length that lies
	f.Add(frame("WSRS", maxResult, []byte{1, 0, 0, 0, 0, 0}))    // another
	f.Add(frame("WSGO", 6, []byte{1, 0, 0, 0, 0, 0}))            // the other direction's
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		for {
			rest := data[len(data)-r.Len():]
			res, err := ReadResult(r)
			if err != nil {
				known(t, rest, err)
				return
			}
			var b bytes.Buffer
			if err := WriteResult(&b, res); err != nil || !bytes.Equal(rest[:len(rest)-r.Len()], b.Bytes()) {
				t.Fatalf("%q was taken as %+v", rest, res)
			}
		}
	})
}
