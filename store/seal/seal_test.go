package seal_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/workspaced/workspaced/store/seal"
)

func newLocal(t testing.TB) *seal.Local {
	t.Helper()
	b, err := seal.NewLocal()
	if err != nil {
		t.Fatal(err)
	}
	key, err := seal.Parse("key of the test", b)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newSealer(t testing.TB) *seal.Sealer {
	t.Helper()
	s, _, err := seal.Create(t.Context(), newLocal(t), "database")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSealer_OpensWhatItSealed(t *testing.T) {
	s := newSealer(t)
	rapid.Check(t, func(t *rapid.T) {
		plain := rapid.SliceOf(rapid.Byte()).Draw(t, "plain")
		associated := rapid.SliceOf(rapid.Byte()).Draw(t, "associated")
		sealed, err := s.Seal(plain, associated)
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Open(sealed, associated)
		if err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("got %q, %v", got, err)
		}
	})
}

func TestSealer_Overhead(t *testing.T) {
	s := newSealer(t)
	for _, n := range []int{0, 1, 33, 64 << 10} {
		sealed, err := s.Seal(make([]byte, n), nil)
		if err != nil || len(sealed) != n+seal.Overhead {
			t.Errorf("%d bytes are sealed to %d, %v", n, len(sealed), err)
		}
	}
}

func TestSealer_Confidential(t *testing.T) {
	s := newSealer(t)
	plain := bytes.Repeat([]byte(canary), 10)
	a, err := s.Seal(plain, nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Seal(plain, nil)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(a, []byte(canary)) {
		t.Error("the plaintext is in the ciphertext")
	}
	if bytes.Equal(a, b) {
		t.Error("sealing twice gives the same bytes: equal values can be told")
	}
}

func TestSealer_Integrity(t *testing.T) {
	s := newSealer(t)
	associated := seal.AssociatedData("a")
	sealed, err := s.Seal([]byte(canary), associated)
	if err != nil {
		t.Fatal(err)
	}
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 1
		if _, err := s.Open(changed, associated); !errors.Is(err, seal.ErrOpen) {
			t.Fatalf("byte %d changed: got %v", i, err)
		}
	}
	for n := range len(sealed) {
		if _, err := s.Open(sealed[:n], associated); !errors.Is(err, seal.ErrOpen) {
			t.Fatalf("cut to %d bytes: got %v", n, err)
		}
	}
	if _, err := s.Open(nil, associated); !errors.Is(err, seal.ErrOpen) {
		t.Fatalf("nothing: got %v", err)
	}
}

func TestSealer_MoveIntegrity(t *testing.T) {
	s := newSealer(t)
	place := []string{"workspace", "uid", "KEY", "1"}
	sealed, err := s.Seal([]byte(canary), seal.AssociatedData(place...))
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range [][]string{
		{"global", "uid", "KEY", "1"},
		{"workspace", "uie", "KEY", "1"},
		{"workspace", "uid", "KEZ", "1"},
		{"workspace", "uid", "KEY", "2"},
		{"workspace", "uidKEY", "", "1"},
		{"workspace", "ui", "dKEY", "1"},
		{"workspace", "uid", "KEY"},
		nil,
	} {
		if _, err := s.Open(sealed, seal.AssociatedData(other...)); !errors.Is(err, seal.ErrOpen) {
			t.Errorf("opens at %q: %v", other, err)
		}
	}
}

func TestSealer_KeyIntegrity(t *testing.T) {
	sealed, err := newSealer(t).Seal([]byte(canary), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newSealer(t).Open(sealed, nil); !errors.Is(err, seal.ErrOpen) {
		t.Errorf("opens with another key: %v", err)
	}
}

func TestSealer_PrintsNoKey(t *testing.T) {
	s := newSealer(t)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d"} {
		if got := fmt.Sprintf(verb, s); got != "seal.Sealer" {
			t.Errorf("%s printed %s", verb, got)
		}
	}
}

func TestAssociatedData_Unambiguous(t *testing.T) {
	fields := rapid.SliceOfN(rapid.StringOfN(rapid.RuneFrom([]rune("ab\x00\x01\x02")), 0, 3, -1), 0, 4)
	rapid.Check(t, func(t *rapid.T) {
		a, b := fields.Draw(t, "a"), fields.Draw(t, "b")
		same := fmt.Sprintf("%q", a) == fmt.Sprintf("%q", b)
		if got := bytes.Equal(seal.AssociatedData(a...), seal.AssociatedData(b...)); got != same {
			t.Fatalf("%q and %q: same bytes is %t", a, b, got)
		}
	})
}
