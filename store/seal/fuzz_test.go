package seal_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/workspaced/workspaced/store/seal"
)

// Whatever is in a key file: it is refused with one sentence that names the file
// and says nothing of what is in it, or it seals.
func FuzzLoad(f *testing.F) {
	path := filepath.Join(f.TempDir(), "key")
	if _, err := seal.LoadOrCreate(path); err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add(bytes.Replace(good, []byte("ENABLED"), []byte("DISABLED"), 1))
	f.Add(bytes.Replace(good, []byte("AesGcmKey"), []byte("AesSivKey"), 1))
	f.Add(bytes.Replace(good, []byte(`"primaryKeyId":`), []byte(`"primaryKeyId":1`), 1))
	f.Add([]byte(nil))
	f.Add([]byte("{}"))
	f.Add([]byte("null"))
	f.Add([]byte("\x00\xff"))
	f.Fuzz(func(t *testing.T, content []byte) {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := seal.Load(path)
		if err != nil {
			text := strings.ReplaceAll(err.Error(), path, "PATH")
			if text == err.Error() || strings.Contains(text, "\n") || len(text) > 200 || len(content) > 20 && strings.Contains(text, string(content)) {
				t.Errorf("not one clear sentence: %v", err)
			}
			return
		}
		sealed, err := s.EncryptWithContext(t.Context(), []byte("plain"), []byte("place"))
		if err != nil {
			t.Fatal(err)
		}
		if plain, err := s.DecryptWithContext(t.Context(), sealed, []byte("place")); err != nil || string(plain) != "plain" {
			t.Errorf("got %q, %v", plain, err)
		}
	})
}

// Nothing opens but what was sealed, at its place.
func FuzzOpen(f *testing.F) {
	s := newSealer(f)
	place := seal.AssociatedData("secret", "uid", "KEY", "1")
	sealed, err := s.Seal([]byte("plain"), place)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed, place)
	f.Add(sealed[:len(sealed)-1], place)
	f.Add(append(bytes.Clone(sealed), 0), place)
	f.Add(sealed, seal.AssociatedData("secret", "uid", "KEY", "2"))
	f.Add([]byte(nil), place)
	// Patches of what was sealed, because a fuzzer never finds its own way to it.
	f.Add([]byte{0, 1}, place)
	f.Add([]byte{20, 0x80}, place)
	f.Fuzz(func(t *testing.T, b, associated []byte) {
		mutated := bytes.Clone(sealed)
		for i := 0; i+1 < len(b); i += 2 {
			mutated[int(b[i])%len(mutated)] ^= b[i+1]
		}
		for _, candidate := range [][]byte{b, mutated} {
			plain, err := s.Open(candidate, associated)
			if same := bytes.Equal(candidate, sealed) && bytes.Equal(associated, place); same != (err == nil) || same && string(plain) != "plain" {
				t.Errorf("%x at %x gives %q, %v", candidate, associated, plain, err)
			}
		}
	})
}
