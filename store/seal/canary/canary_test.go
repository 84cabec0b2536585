package canary_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/ascii85"
	"encoding/base32"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/workspaced/workspaced/store/seal/canary"
)

func TestValues(t *testing.T) {
	set := canary.New()
	a, b := set.Value("a"), set.Value("b")
	for _, v := range []string{a, b} {
		if len(v) != 26 || v[0] != 'c' || strings.Trim(v, "abcdefghijklmnopqrstuvwxyz234567") != "" {
			t.Errorf("value %q", v)
		}
	}
	if a == b || a[:16] != b[:16] {
		t.Errorf("values %q and %q", a, b)
	}
	if other := canary.New().Value("a"); other[:16] == a[:16] {
		t.Errorf("two sets share the marker of %q", other)
	}
	if hits := set.Find([]byte(canary.New().Value("a"))); hits != nil {
		t.Errorf("another set's value is found: %v", hits)
	}
}

// Every form is found, wherever in whatever it is, by name and by who wrote it.
func TestForms(t *testing.T) {
	utf := func(order binary.AppendByteOrder) func(string) string {
		return func(v string) string {
			var out []byte
			for _, u := range utf16.Encode([]rune("Ä: " + v + "\n")) {
				out = order.AppendUint16(out, u)
			}
			return string(out)
		}
	}
	list := func(separator, format string) func(string) string {
		return func(v string) string {
			var out []string
			for _, c := range []byte(v) {
				out = append(out, fmt.Sprintf(format, c))
			}
			return strings.Join(out, separator)
		}
	}
	words := func(order binary.ByteOrder) func(string) string {
		return func(v string) (out string) {
			for v += "x"; len(v) > 1; v = v[2:] {
				out += fmt.Sprintf("%04x ", order.Uint16([]byte(v)))
			}
			return out
		}
	}
	named := true
	for _, tt := range []struct {
		form   string
		encode func(string) string
		named  bool // it can be told which value it is
	}{
		{"as it is", func(v string) string { return v }, named},
		{"as it is", func(v string) string { return strconv.Quote("\"\n<" + v) }, named},
		{"as it is", func(v string) string { return url.QueryEscape("&%=" + v) }, named},
		{"as it is", func(v string) string {
			out, _ := json.Marshal("<\u2028" + v)
			return string(out)
		}, named},
		{"as it is", func(v string) string { return prototext.Format(wrapperspb.String("\x01" + v)) }, named},
		{"base64", func(v string) string { return base64.StdEncoding.EncodeToString([]byte(v)) }, named},
		{"base64", func(v string) string { return base64.RawURLEncoding.EncodeToString([]byte(v)) }, named},
		{"base32", func(v string) string { return base32.StdEncoding.EncodeToString([]byte(v)) }, named},
		{"hexadecimal", func(v string) string { return hex.EncodeToString([]byte(v)) }, named},
		{"hexadecimal", func(v string) string { return fmt.Sprintf("%x", v) }, named},
		{"hexadecimal, upper case", func(v string) string { return fmt.Sprintf("%X", v) }, named},
		{"hexadecimal with spaces", func(v string) string { return fmt.Sprintf("% x", v) }, named},
		{"hexadecimal with colons", list(":", "%02x"), named},
		{"hex dump in words of two bytes", words(binary.BigEndian), named},
		{"hex dump in words of two bytes, little endian", words(binary.LittleEndian), named},
		{"hex escapes", list("", `\x%02x`), named},
		{"Go's %#v of bytes", func(v string) string { return fmt.Sprintf("%#v", []byte(v)) }, named},
		{"Go's %v of bytes", func(v string) string { return fmt.Sprintf("%v", []byte(v)) }, named},
		{"JSON list of bytes", func(v string) string {
			out, _ := json.Marshal([]rune(v)) // numbers; of bytes it makes base64
			return string(out)
		}, named},
		{"list of bytes", list(", ", "%d"), named},
		{"octal escapes", list("", `\%03o`), named},
		{"percent escapes", list("", "%%%02X"), named},
		{"percent escapes, lower case", list("", "%%%02x"), named},
		{"unicode escapes", list("", `\u%04x`), named},
		{"UTF-16, big endian", utf(binary.BigEndian), named},
		{"UTF-16, little endian", utf(binary.LittleEndian), named},
		{"words of a Go trace", func(v string) string {
			var words []string
			for v += "1234567"; len(v) >= 8; v = v[8:] {
				words = append(words, fmt.Sprintf("0x%x", binary.LittleEndian.Uint64([]byte(v))))
			}
			return "main.f({" + strings.Join(words, ", ") + "})"
		}, false},
	} {
		t.Run(tt.form, func(t *testing.T) {
			set := canary.New()
			set.Value("another")
			v := set.Value("this one")
			for before := range 9 {
				for _, behind := range []string{"", "xyz"} {
					text := "x" + tt.encode(strings.Repeat("y", before)+v+behind) + "x"
					want := canary.Hit{Form: tt.form}
					if tt.named {
						want.Name = "this one"
					}
					// It can look like another form as well.
					if got := set.Find([]byte(text)); !slices.Contains(got, want) || slices.ContainsFunc(got, func(h canary.Hit) bool { return h.Name == "another" }) {
						t.Fatalf("in %q found %v, want %v", text, got, want)
					}
				}
			}
		})
	}
	// A test of the test: what no row encodes is not found.
	set := canary.New()
	text := make([]byte, 100)
	text = text[:ascii85.Encode(text, []byte(set.Value("a")))]
	if hits := set.Find(text); hits != nil {
		t.Errorf("found %v in %q", hits, text)
	}
}

// A value that was made elsewhere is found beside the set's own.
func TestAdd(t *testing.T) {
	set := canary.New()
	other := "wsd_" + strings.Repeat("Ab-_9", 6)
	set.Add("token", other)
	text := fmt.Sprintf("%x, %s, %s", other, base64.StdEncoding.EncodeToString([]byte("x"+other)), set.Value("own"))
	want := []canary.Hit{{Name: "token", Form: "hexadecimal"}, {Name: "token", Form: "base64"}, {Name: "own", Form: "as it is"}}
	if diff := cmp.Diff(want, set.Find([]byte(text))); diff != "" {
		t.Error(diff)
	}
}

// A value that was cut off behind the marker is found, without its name.
func TestBeginning(t *testing.T) {
	set := canary.New()
	want := []canary.Hit{{Form: "as it is"}}
	if diff := cmp.Diff(want, set.Find([]byte(set.Value("a")[:20]+"..."))); diff != "" {
		t.Error(diff)
	}
}

func gzipped(t *testing.T, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zstded(t *testing.T, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(data, nil)
}

func tarred(t *testing.T, name string, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(data)), Mode: 0o600}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// Each kind of file: the value is found, and told where.
func TestSearch(t *testing.T) {
	noise := func(n int) []byte { return bytes.Repeat([]byte("0123456789abcdef"), n/16) }
	for _, tt := range []struct {
		name string
		file func(t *testing.T, v string) []byte
		want string // behind the path
	}{
		{"log", func(t *testing.T, v string) []byte { return []byte("level=INFO msg=" + v + "\n") }, ""},
		{"large", func(t *testing.T, v string) []byte { return slices.Concat(noise(1<<20), []byte(v), noise(1<<20)) }, ""},
		{"gzip", func(t *testing.T, v string) []byte { return gzipped(t, append(noise(1<<17), v...)) }, " > gzip"},
		{"zstd", func(t *testing.T, v string) []byte { return zstded(t, append(noise(1<<17), v...)) }, " > zstd"},
		{"layer", func(t *testing.T, v string) []byte {
			return gzipped(t, tarred(t, "etc/secret", []byte(base64.StdEncoding.EncodeToString([]byte(v)))))
		}, " > gzip > tar: etc/secret"},
		{"zstd layer", func(t *testing.T, v string) []byte { return zstded(t, tarred(t, "etc/secret", []byte(v))) }, " > zstd > tar: etc/secret"},
		{"image", func(t *testing.T, v string) []byte { // docker save
			return tarred(t, "layer.tar.gz", gzipped(t, tarred(t, "secret", []byte(v))))
		}, " > tar: layer.tar.gz > gzip > tar: secret"},
		{"half an archive", func(t *testing.T, v string) []byte {
			whole := gzipped(t, append([]byte(v), noise(1<<17)...))
			return whole[:len(whole)/2]
		}, " > gzip"},
		{"behind an archive", func(t *testing.T, v string) []byte { return append(gzipped(t, noise(1<<17)), v...) }, ""},
		{"no archive", func(t *testing.T, v string) []byte { return []byte("\x1f\x8b" + v) }, ""},
		{"name of a file", nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			set := canary.New()
			v := set.Value("v")
			dir := t.TempDir()
			path := filepath.Join(dir, "sub", "file")
			want, content := path+tt.want, noise(16)
			if tt.file == nil {
				path = filepath.Join(dir, "sub", "file-"+v)
				want = "the name of " + path
			} else {
				content = tt.file(t, v)
			}
			write(t, path, content)
			search := &canary.Search{Set: set}
			if err := search.Dir(dir); err != nil {
				t.Fatal(err)
			}
			var where []string
			for _, h := range search.Hits {
				if h.Name != "v" {
					t.Errorf("hit %v", h)
				}
				where = append(where, h.Where)
			}
			if !slices.Contains(where, want) || search.Files != 1 {
				t.Errorf("%d files, found in %q, want %q", search.Files, where, want)
			}
		})
	}
}

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// At every place in the pieces that a file is read in.
func TestSearchAcrossPieces(t *testing.T) {
	set := canary.New()
	v := strings.Repeat(" ", 100) + fmt.Sprintf("% x", set.Value("v")) + strings.Repeat(" ", 100)
	for _, before := range []int{256 << 10, 256<<10 - 512, 512<<10 - 512} {
		for shift := -120; shift <= 120; shift += 17 {
			text := strings.Repeat("-", before+shift-100) + v
			search := &canary.Search{Set: set}
			if err := search.Reader("text", strings.NewReader(text+strings.Repeat("-", 1000))); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]canary.Hit{{Name: "v", Form: "hexadecimal with spaces", Where: "text"}}, search.Hits); diff != "" {
				t.Fatalf("%d and %d: %s", before, shift, diff)
			}
		}
	}
}

// A file that has changed is looked at again, one that has not is not; what Skip
// says is left out; links tell where they lead.
func TestSearchAgain(t *testing.T) {
	set := canary.New()
	dir := t.TempDir()
	path := filepath.Join(dir, "a")
	write(t, path, []byte("nothing"))
	write(t, filepath.Join(dir, "left out", "b"), []byte(set.Value("left out")))
	search := &canary.Search{Set: set, Skip: func(_ string, e fs.DirEntry) bool { return e.Name() == "left out" }}
	look := func(files int64, names ...string) {
		t.Helper()
		search.Files, search.Hits = 0, nil
		if err := search.Dir(dir); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, h := range search.Hits {
			got = append(got, h.Name)
		}
		if search.Files != files || !slices.Equal(got, names) {
			t.Errorf("searched %d files and found %q, want %d and %q", search.Files, got, files, names)
		}
	}
	look(1)
	look(0)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(f, set.Value("appended")); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	look(1, "appended")
	look(0)
	if err := os.Symlink("/nowhere/"+set.Value("link"), filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	look(0, "link")
}

// What was deleted from a bbolt database, and lies in a free page.
func TestSearchFreePages(t *testing.T) {
	set := canary.New()
	path := filepath.Join(t.TempDir(), "db")
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	key := []byte("key")
	for _, update := range []func(*bolt.Bucket) error{
		func(b *bolt.Bucket) error { return b.Put(key, []byte(set.Value("deleted"))) },
		func(b *bolt.Bucket) error { return b.Delete(key) },
	} {
		if err := db.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists([]byte("b"))
			if err != nil {
				return err
			}
			return update(b)
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.View(func(tx *bolt.Tx) error {
		if tx.Bucket([]byte("b")).Get(key) != nil {
			t.Error("it is still there")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	search := &canary.Search{Set: set}
	if err := search.Dir(path); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]canary.Hit{{Name: "deleted", Form: "as it is", Where: path}}, search.Hits); diff != "" {
		t.Error(diff)
	}
}

// Of a process: arguments, environment, and files that it has open and that have
// no name any more.
func TestSearchProcess(t *testing.T) {
	set := canary.New()
	arg, env := set.Value("argument"), set.Value("environment")
	deleted, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer deleted.Close()
	if _, err := io.WriteString(deleted, set.Value("deleted file")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(deleted.Name()); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "echo; read end", arg)
	cmd.Env = []string{"SECRET=" + env}
	cmd.ExtraFiles = []*os.File{deleted}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait() //nolint:errcheck // read fails at the end of its input
	defer in.Close()
	if _, err := out.Read(make([]byte, 1)); err != nil { // it is the shell, and not we any more
		t.Fatal(err)
	}

	search := &canary.Search{Set: set}
	if err := search.Process(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, h := range search.Hits {
		got = append(got, h.Name)
	}
	if diff := cmp.Diff([]string{"argument", "environment", "deleted file"}, got); diff != "" {
		t.Error(diff)
	}
	search = &canary.Search{Set: set}
	if err := search.CommandLine(cmd.Process.Pid); err != nil || len(search.Hits) != 1 || search.Hits[0].Name != "argument" {
		t.Errorf("the command line: %v, %v", search.Hits, err)
	}
	if err := search.Process(1 << 30); err != nil {
		t.Errorf("a process that is not there: %v", err)
	}
}
