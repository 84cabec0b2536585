package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/fnv"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// fuzzRows are the rows that FuzzRow fills with anything: of which key, and
// whether a call that meets it may name another row.
var fuzzRows = []struct {
	bucket []byte
	key    func(a, b Workspace) string
}{
	{bucketWorkspaces, func(a, _ Workspace) string { return a.ID }},
	{bucketSecrets, func(a, _ Workspace) string { return a.UID + "/K" }},
	{bucketSealed, func(a, _ Workspace) string { return string(ownerOf(&a).value("K", 1)) }},
	{bucketSecrets, func(a, _ Workspace) string { return a.UID + "/" }},
	{bucketFeed, func(a, _ Workspace) string { return string(number(a.Revision)) }},
	{bucketRemoved, func(Workspace, Workspace) string { return string(number(3)) }},
	{bucketRequests, func(Workspace, Workspace) string { return "id" }},
	{bucketRollouts, func(Workspace, Workspace) string { return string(number(1 << 40)) }},
	{bucketCounters, func(Workspace, Workspace) string { return string(counterRevision) }},
	{bucketCounters, func(Workspace, Workspace) string { return string(counterFloor) }},
	{bucketCounters, func(Workspace, Workspace) string { return string(counterTombstones) }},
	{bucketCounters, func(Workspace, Workspace) string { return string(counterRequests) }},
	{bucketCounters, func(Workspace, Workspace) string { return string(counterAudit) }},
	{bucketAudit, func(Workspace, Workspace) string { return string(number(1)) }},
}

// Whatever a row has: each call gives an error that names it, or what is true of
// the others; never a panic, never a value that is not the key's own.
func FuzzRow(f *testing.F) {
	h := newHarness(f)
	h.cfg.rollouts = neverRolledOut
	h.cfg.rollouts.above = 1000
	h.reopen()
	h.db.NoSync = true
	a := h.create("a", value("K", "the value of K"), value("L", "the value of L"))
	h.create("b", value("K", "another value"))
	h.create("gone")
	h.remove("gone")
	must(h.RestartWorkspace(ctx, "b", request("id", "one")))(h.t)
	b := must(h.Workspace("b"))(h.t)
	good := dump(h.t, h.db)

	for i, row := range fuzzRows {
		key := row.key(a, b)
		f.Add(uint8(i), []byte(good[string(row.bucket)][key]))
		f.Add(uint8(i), []byte(good["workspaces"]["b"]))
		f.Add(uint8(i), []byte(good["secrets"][b.UID+"/K"]))
		f.Add(uint8(i), []byte(good["sealed"][string(ownerOf(&b).value("K", 1))]))
		f.Add(uint8(i), number(1<<63))
		f.Add(uint8(i), []byte("null"))
		f.Add(uint8(i), []byte(`{"keys":["K"],"time":"2026-01-02T03:04:05Z"}`))
		f.Add(uint8(i), []byte(nil))
	}
	f.Fuzz(func(t *testing.T, which uint8, row []byte) {
		h.t = t
		kind := fuzzRows[int(which)%len(fuzzRows)]
		key := kind.key(a, b)
		h.edit(func(tx *bolt.Tx) error { return tx.Bucket(kind.bucket).Put([]byte(key), row) })
		check := func(err error) (failed bool) {
			t.Helper()
			if err == nil {
				return false
			}
			var damaged *RowError
			var secret *KeyError
			var notFound *NotFoundError
			var version *VersionError
			switch {
			case errors.As(err, &damaged):
				if damaged.Bucket != string(kind.bucket) || damaged.Key != key {
					t.Errorf("it names row %q in %s", damaged.Key, damaged.Bucket)
				}
			case errors.As(err, &secret):
				if secret.Key != "K" && !errors.Is(err, ErrModelKey) {
					t.Errorf("it names secret %s", secret.Key)
				}
			case errors.Is(err, ErrCompacted) && bytes.Equal(kind.bucket, bucketCounters),
				errors.Is(err, ErrDeleting), errors.Is(err, ErrParked), errors.Is(err, ErrTooLarge), errors.Is(err, ErrRequestReused),
				errors.Is(err, ErrVersionCurrent), errors.Is(err, ErrVersionDisabled), errors.Is(err, ErrVersionDestroyed),
				errors.As(err, &version) && errors.Is(err, ErrUnreadable),
				errors.As(err, &notFound) && (len(row) > 0 || notFound.Version != 0): // the row makes sense, and says so
			default:
				t.Errorf("got %v", err)
			}
			if len(row) > 40 && strings.Contains(err.Error(), string(row)) {
				t.Errorf("the error says what is in the row: %v", err)
			}
			return true
		}
		own := map[string]string{"aK": "the value of K", "aL": "the value of L", "bK": "another value"}
		for _, id := range []string{"a", "b"} {
			if w, err := h.Workspace(id); !check(err) && w.ID != id {
				t.Errorf("%s is %+v", id, w)
			}
			snapshot, err := h.Snapshot(id)
			if !check(err) && len(snapshot.Secrets) == 0 && !bytes.Equal(kind.bucket, bucketWorkspaces) {
				t.Errorf("%s has lost its secrets", id)
			}
			for _, s := range snapshot.Secrets {
				if s.Value.Reveal() != own[id+s.Key] {
					t.Errorf("%s of %s has another value", s.Key, id)
				}
			}
			if bytes.Equal(kind.bucket, bucketSealed) && id == "a" && err == nil && string(row) != good["sealed"][key] {
				t.Error("another sealed value opens")
			}
			_, err = h.Secret(in(id), "K")
			check(err)
			_, _, err = h.ListSecrets(in(id), "", 0)
			check(err)
			_, _, err = h.ListSecretVersions(in(id), "K", 0, 0)
			check(err)
			rehearse := Options{ValidateOnly: true}
			for version := int64(1); version <= 2; version++ {
				for _, state := range []VersionState{VersionEnabled, VersionDestroyed} {
					_, err = h.SetVersionState(ctx, in(id), "K", version, state, rehearse)
					check(err)
				}
				_, err = h.UpdateSecrets(ctx, in(id), SecretsUpdate{RollBack: &RollBack{"K", version}}, rehearse)
				check(err)
			}
			_, err = h.RestartWorkspace(ctx, id, rehearse)
			check(err)
			_, err = h.UpdateSecrets(ctx, in(id), SecretsUpdate{Set: set("K", "new").Set, Delete: []string{"L"}}, rehearse)
			check(err)
			_, err = h.DeleteWorkspace(ctx, id, false, rehearse)
			check(err)
		}
		_, _, err := h.ListWorkspaces("", 0, nil)
		check(err)
		_, err = h.Feed(0, 0)
		check(err)
		_, err = h.Feed(1, 0)
		check(err)
		_, err = h.UpdateSecrets(ctx, Scope{}, set("G", "new"), Options{ValidateOnly: true})
		check(err)
		_, err = h.RestartWorkspace(ctx, "b", Options{RequestID: "id", Fingerprint: []byte("one"), ValidateOnly: true})
		check(err)
		// What a removal and what each commit does.
		_, err = change(ctx, h.Store, true, func(t *txn) (int, error) { return 0, t.putTombstone(&a) })
		check(err)
		_, err = change(ctx, h.Store, true, func(t *txn) (int, error) {
			t.now = t.now.Add(-year)
			return 0, t.purgeRequests()
		})
		check(err)
		_, err = change(ctx, h.Store, true, func(t *txn) (int, error) {
			_, err := t.rollOut(rolling{})
			return 0, err
		})
		check(err)

		h.edit(func(tx *bolt.Tx) error {
			if v, ok := good[string(kind.bucket)][key]; ok {
				return tx.Bucket(kind.bucket).Put([]byte(key), []byte(v))
			}
			return tx.Bucket(kind.bucket).Delete([]byte(key))
		})
	})
}

// fuzzFiles are databases that FuzzOpen damages, the same in every process: a
// small one with some of everything, and one with a tree of pages.
func fuzzFiles(t testing.TB) (files [][]byte, kek *seal.Local) {
	t.Helper()
	kek = must(seal.Load(chmod600(t, filepath.Join("testdata", "fuzz.key"))))(t)
	for _, name := range []string{"fuzz-small.db", "fuzz-tree.db"} {
		files = append(files, must(os.ReadFile(filepath.Join("testdata", name)))(t))
	}
	return files, kek
}

// chmod600 returns a copy of a key file that nobody else can read, as git does
// not make them.
func chmod600(t testing.TB, path string) string {
	t.Helper()
	private := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(private, must(os.ReadFile(path))(t), 0o600); err != nil {
		t.Fatal(err)
	}
	return private
}

// TestFuzzFiles writes the files that FuzzOpen damages, when the schema has
// changed.
func TestFuzzFiles(t *testing.T) {
	if !*updateFixture {
		files, kek := fuzzFiles(t)
		for _, file := range files {
			cfg := Config{Path: filepath.Join(t.TempDir(), "db"), KEK: kek, rollouts: neverRolledOut}
			if err := os.WriteFile(cfg.Path, file, 0o600); err != nil {
				t.Fatal(err)
			}
			s := must(Open(cfg))(t)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		return
	}
	small := filledWith(t, 3, 10)
	tree := newHarness(t)
	tree.close()
	tree.cfg.KEK = small.cfg.KEK
	if err := os.Remove(tree.cfg.Path); err != nil {
		t.Fatal(err)
	}
	tree.cfg.rollouts = neverRolledOut
	tree.open()
	for i := range 30 {
		tree.create(strings.Repeat("w", 1+i), value("K", strings.Repeat("k", 100)))
	}
	must(tree.UpdateSecrets(ctx, Scope{}, set("G", "g"), request("id", "one")))(t)
	key := must(os.ReadFile(filepath.Join(filepath.Dir(small.cfg.Path), "key")))(t)
	for name, content := range map[string][]byte{"fuzz.key": key, "fuzz-small.db": small.closeAndRead(), "fuzz-tree.db": tree.closeAndRead()} {
		if err := os.WriteFile(filepath.Join("testdata", name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// patchSize is how many bytes of FuzzOpen's input say one thing: page 1,
// offset in it 2, what 1, a number 8.
const patchSize = 12

// patch damages a file as patches say, which fits more than bytes: numbers of
// all sizes, pages that are copied, cut off or cleared, and meta pages with a
// checksum that is right again.
func patch(file, patches []byte) []byte {
	const pageSize = 4096
	file = slices.Clone(file)
	for ; len(patches) >= patchSize && len(file) >= 2*pageSize; patches = patches[patchSize:] {
		pages := len(file) / pageSize
		id := int(patches[0]) % pages
		offset := int(binary.BigEndian.Uint16(patches[1:])) % (pageSize - 8)
		n := binary.BigEndian.Uint64(patches[4:])
		page := file[id*pageSize : (id+1)*pageSize]
		switch patches[3] % 9 {
		case 0:
			page[offset] = byte(n)
		case 1:
			page[offset] ^= byte(n)
		case 2:
			order.PutUint16(page[offset&^1:], uint16(n))
		case 3:
			order.PutUint32(page[offset&^3:], uint32(n))
		case 4:
			order.PutUint64(page[offset&^7:], n)
		case 5:
			other := int(n % uint64(pages))
			copy(page, file[other*pageSize:(other+1)*pageSize])
		case 6:
			clear(page[offset:])
		case 7:
			file = file[:id*pageSize+offset]
		case 8: // of a number in a header or an element, and the checksum is right
			meta := file[(id&1)*pageSize+pageHeaderSize:]
			order.PutUint64(meta[offset%(metaSize/8-1)*8:], n)
			sum := fnv.New64a()
			_, _ = sum.Write(meta[:metaSize-8])
			order.PutUint64(meta[metaSize-8:], sum.Sum64())
		}
	}
	return file
}

// tearNewest makes the meta page of the newest commit invalid.
func tearNewest(file []byte) []byte {
	file = slices.Clone(file)
	m0, _, _ := parseMeta(file)
	m1, _, _ := parseMeta(file[m0.pageSize:])
	if m0.txid > m1.txid {
		file[pageHeaderSize+metaSize-1] ^= 1
	} else {
		file[m0.pageSize+pageHeaderSize+metaSize-1] ^= 1
	}
	return file
}

// However a file is damaged: Open refuses it with one clear sentence and changes
// nothing, or all that can be read is intact, and it can be written. Where the
// newest meta page is torn it is what was there before the last commit.
func FuzzOpen(f *testing.F) {
	files, kek := fuzzFiles(f)
	dir := f.TempDir()
	want := make([][2]truth, len(files))
	for i, file := range files {
		h := openBytes(f, dir, file, kek)
		want[i][0] = readAll(f, h)
		h.close()
		h = openBytes(f, dir, tearNewest(file), kek)
		want[i][1] = readAll(f, h)
		h.close()
		free := freePages(f, file)
		for page := range len(file) / 4096 {
			if free[page] {
				continue
			}
			for what := range byte(9) {
				f.Add(uint8(i), []byte{byte(page), 0, byte(8 + page), what, 0, 0, 0, 0, 0, 0, 0, byte(page * 37)})
			}
			// The count and length of a page, and where its elements point.
			for _, offset := range []byte{10, 12, 16, 20, 24, 28} {
				f.Add(uint8(i), []byte{byte(page), 0, offset, 3, 0, 0, 0, 0, 0, 0, 0, 3})
			}
		}
		for field := range byte(7) {
			f.Add(uint8(i), []byte{0, 0, field, 8, 0, 0, 0, 0, 0, 0, 0, 5, 1, 0, field, 8, 0, 0, 0, 0, 0, 0, 0, 5})
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, patches []byte) {
		i := int(which) % len(files)
		file := patch(files[i], patches)
		within(t, 30*time.Second, func() { openDamaged(t, dir, file, kek, want[i]) })
	})
}

func openBytes(t testing.TB, dir string, file []byte, kek *seal.Local) *harness {
	t.Helper()
	h := &harness{t: t, clock: newClock()}
	h.cfg = Config{Path: filepath.Join(dir, "db"), KEK: kek, Now: h.clock.Now, rollouts: neverRolledOut}
	if err := os.WriteFile(h.cfg.Path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	h.open()
	return h
}

func openDamaged(t *testing.T, dir string, file []byte, kek *seal.Local, either [2]truth) {
	h := &harness{t: t, clock: newClock()}
	h.cfg = Config{Path: filepath.Join(dir, "db"), KEK: kek, Now: h.clock.Now, rollouts: neverRolledOut}
	if err := os.WriteFile(h.cfg.Path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(h.cfg)
	if err != nil {
		if text := err.Error(); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrWrongKey) && !errors.Is(err, ErrSchema) || strings.Contains(text, "\n") || strings.Contains(text, "panic") || len(text) > 500 {
			t.Errorf("not one clear sentence: %v", err)
		}
		if !bytes.Equal(file, must(os.ReadFile(h.cfg.Path))(t)) {
			t.Error("it was changed")
		}
		return
	}
	h.Store = s
	defer func() { _ = h.Close() }()
	want := either[0]
	if h.Revision() == either[1].revision {
		want = either[1]
	}
	// What the bytes of a record say nobody can know; but there is each of them, and
	// no secret has a value that is not its own.
	ws, _, err := h.ListWorkspaces("", 0, nil)
	if err != nil || len(ws) != len(want.workspaces) {
		t.Fatalf("%d of %d workspaces, %v", len(ws), len(want.workspaces), err)
	}
	for _, w := range ws {
		id := w.ID
		snapshot, err := h.Snapshot(id)
		if err != nil && !errors.Is(err, ErrUnreadable) {
			t.Errorf("%s: %v", id, err)
		}
		for _, secret := range snapshot.Secrets {
			if v, known := want.values[id][secret.Key]; known && v != secret.Value.Reveal() {
				t.Errorf("%s of %s has another value", secret.Key, id)
			}
		}
		if n := len(snapshot.Secrets); err == nil && n < len(want.values[id]) {
			t.Errorf("%s has %d secrets", id, n)
		}
	}
	if page, err := h.Feed(0, 0); err != nil || len(page.Entries) != len(ws) {
		t.Errorf("%d in the feed, %v", len(page.Entries), err)
	}
	// All pages can be written, and the file is as good as before.
	h.db.NoSync = true
	for _, w := range ws {
		_, err := h.UpdateWorkspace(ctx, w.ID, func(e *Editable) error { e.Labels = map[string]string{"n": "1"}; return nil }, Options{})
		if err != nil && !errors.Is(err, ErrDeleting) && !errors.Is(err, ErrModelKey) {
			t.Errorf("%s: %v", w.ID, err)
		}
		if _, err := h.UpdateSecrets(ctx, in(w.ID), set("NEW", strings.Repeat("n", 1000)), Options{}); err != nil && !errors.Is(err, ErrDeleting) {
			t.Errorf("%s: %v", w.ID, err)
		}
	}
	h.reopen()
}
