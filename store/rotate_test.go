package store

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
	"github.com/workspaced/workspaced/store/seal"
)

// manualUpkeep lets a test do the upkeep, part by part.
type manualUpkeep chan time.Time

// newManualUpkeep returns one, for a harness that is opened again by it.
func newManualUpkeep(h *harness) manualUpkeep {
	s := make(manualUpkeep)
	h.cfg.upkeep = s
	h.reopen()
	return s
}

// step does the next part of the upkeep, and reports whether there was any.
func (s manualUpkeep) step(h *harness) bool {
	h.t.Helper()
	if keys := h.keys(); !keys.Rotating && !keys.Compacting {
		return false
	}
	s <- time.Time{}
	if err := h.Ping(ctx); err != nil { // it is done
		h.t.Fatal(err)
	}
	return true
}

func (h *harness) keys() Keys {
	h.t.Helper()
	return must(h.Keys(ctx))(h.t)
}

// keptUp waits for the end of all upkeep, and of its last commit.
func (h *harness) keptUp() {
	h.t.Helper()
	for keys := h.keys(); keys.Rotating || keys.Compacting; keys = h.keys() {
		if err := h.Ping(ctx); err != nil {
			h.t.Fatal(err)
		}
	}
	if err := h.Ping(ctx); err != nil {
		h.t.Fatal(err)
	}
}

// sealedOnes returns everything that is sealed, by its place.
func sealedOnes(t testT, db *bolt.DB) map[string]string {
	t.Helper()
	sealed := map[string]string{}
	err := db.View(func(tx *bolt.Tx) error {
		for _, kind := range allSealed {
			err := tx.Bucket(kind.bucket).ForEach(func(k, v []byte) error {
				if s := kind.sealed(k, v); s != nil {
					sealed[string(kind.bucket)+"/"+string(k)] = string(s)
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

// checkKeys checks that everything is sealed with the primary, and what else Keys
// tells.
func checkKeys(t testT, h *harness, primary uint32) {
	t.Helper()
	sealed := sealedOnes(t, h.db)
	want := Keys{KEK: h.cfg.KEK.Name(), Primary: primary, Records: map[uint32]int64{primary: 0}, RotateTime: h.keys().RotateTime}
	if diff := cmp.Diff(want, h.keys()); diff != "" {
		t.Error(diff)
	}
	for place, s := range sealed {
		if id, ok := seal.KeyID([]byte(s)); !ok || id != primary {
			t.Errorf("%s is sealed with %d", place, id)
		}
	}
}

// checkNothingLeft checks that the file has nothing of what was sealed, and of
// keys that were wrapped, also not in free pages.
func checkNothingLeft(t testT, h *harness, gone map[string]string) {
	t.Helper()
	file := must(os.ReadFile(h.cfg.Path))(t)
	for place, s := range gone {
		if bytes.Contains(file, []byte(s)) {
			t.Errorf("the file still has what was sealed at %s", place)
		}
	}
}

func TestRotateKey(t *testing.T) {
	h := filledWith(t, 150, 20) // more than a part of a pass
	steps := newManualUpkeep(h)
	must(h.RestartWorkspace(ctx, "w00", request("one more", "fingerprint")))(t)
	old, before, rows := h.keys().Primary, sealedOnes(t, h.db), dump(t, h.db)
	h.record.take()

	r := must(h.RotateKey(ctx, request("rotate", "fingerprint")))(t)
	if !r.Changed || r.KeyID == old || r.KeyID == 0 {
		t.Errorf("got %+v", r)
	}
	if changes := h.record.take(); changes != nil {
		t.Errorf("workspaces have changed: %v", changes)
	}
	keys := h.keys()
	if keys.Primary != r.KeyID || !keys.Rotating || keys.RotateTime.IsZero() || keys.Records[old] != int64(len(before))+1 { // the request as well
		t.Errorf("got %+v", keys)
	}
	h.reopen() // it was durable
	if again := must(h.RotateKey(ctx, request("rotate", "fingerprint")))(t); again.KeyID != r.KeyID {
		t.Errorf("the same request has made another key: %+v", again)
	}
	must(h.UpdateSecrets(ctx, in("w03"), set("NEW", "new"), Options{}))(t)
	must(h.UpdateSecrets(ctx, in("w03"), SecretsUpdate{Delete: []string{"NEW"}}, Options{}))(t)
	truth := readAll(t, h)
	left := h.keys().Records[old]
	for n := 0; steps.step(h); n++ {
		keys := h.keys()
		if keys.Records[old] > left {
			t.Errorf("step %d: %d records are left, before there were %d", n, keys.Records[old], left)
		}
		if keys.Records[old] == left && keys.Rotating && left > 0 {
			t.Errorf("step %d: nothing was sealed anew", n)
		}
		left = keys.Records[old]
		if n%4 == 0 { // a restart goes on where it was, or nearly
			h.reopen()
		}
		if diff := diffTruth(truth, readAll(t, h)); diff != "" {
			t.Fatalf("step %d: %s", n, diff)
		}
	}
	checkKeys(t, h, r.KeyID)
	checkNothingLeft(t, h, before)
	checkNothingLeft(t, h, map[string]string{"the old keys": rows["meta"]["keys"]})
	if entries := must(os.ReadDir(filepath.Dir(h.cfg.Path)))(t); len(entries) != 2 {
		t.Errorf("files: %v", entries)
	}
	h.reopen()
	if diff := diffTruth(truth, readAll(t, h)); diff != "" {
		t.Error(diff)
	}
	must(h.RestartWorkspace(ctx, "w00", request("one more", "fingerprint")))(t) // its fingerprint opens
	// What guards the rows holds for the new ones.
	h.edit(func(tx *bolt.Tx) error {
		row := ownerOf(ptr(must(h.Workspace("w00"))(t))).value("K", 1)
		return tx.Bucket(bucketSealed).Put(row, []byte(before["sealed/"+string(row)]))
	})
	if _, err := h.Snapshot("w00"); !errors.Is(err, ErrUnreadable) {
		t.Errorf("what the retired key has sealed: got %v", err)
	}
}

// prefixForms are what everything begins with that a key has sealed, as it is in the
// file: by itself, and in a record as text.
func prefixForms(key uint32) map[string][]byte {
	prefix := binary.BigEndian.AppendUint32([]byte{1}, key)
	return map[string][]byte{
		"itself": prefix,
		// The last of its characters tells of what comes after it as well.
		"base64": []byte(base64.StdEncoding.EncodeToString(prefix)[:6]),
		"hex":    []byte(hex.EncodeToString(prefix)),
	}
}

// Whatever is sealed in a database with some of everything, a rotation seals anew:
// nothing in the file names the key before. A new kind of sealed row that allSealed
// does not have is found here once the newest fixture has one.
func TestRotateKey_ForgetsNothing(t *testing.T) {
	s := openFixture(t, schemaVersion)
	h := &harness{Store: s, t: t, cfg: s.cfg}
	before, old := readFacts(t, s), h.keys().Primary
	sealed := sealedOnes(t, h.db)
	for _, place := range []string{"meta/check", "meta/audit_key", "requests/id", "indexes/global"} {
		if sealed[place] == "" {
			t.Errorf("the fixture has no %s", place)
		}
	}
	file := must(os.ReadFile(s.cfg.Path))(t)
	for form, least := range map[string]int{"itself": len(sealed) - 1, "base64": 1} {
		if n := bytes.Count(file, prefixForms(old)[form]); n < least {
			t.Errorf("the fixture has %s %d times", form, n)
		}
	}
	primary := must(h.RotateKey(ctx, Options{}))(t).KeyID
	h.keptUp()
	file = must(os.ReadFile(s.cfg.Path))(t)
	for form, prefix := range prefixForms(old) {
		if n := bytes.Count(file, prefix); n != 0 {
			t.Errorf("%d times something that the old key has sealed (%s)", n, form)
		}
	}
	h.reopen()
	checkKeys(t, h, primary)
	after := readFacts(t, h.Store)
	before.Audit, after.Audit = nil, nil // the log goes on
	before.Replayed, after.Replayed = Result{}, Result{}
	if diff := cmp.Diff(before, after, cmp.AllowUnexported(Workspace{})); diff != "" {
		t.Error(diff)
	}
}

func diffTruth(want, got truth) string {
	return cmp.Diff(want, got, cmp.AllowUnexported(truth{}))
}

// Changes go on while keys are rotated again and again: none is lost, none is
// undone, and nothing stays sealed with an old key.
func TestRotateKey_WhileChanging(t *testing.T) {
	h := newHarness(t)
	h.db.NoSync = true
	old := sealedOnes(t, h.db)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	last := make([]int, 3)
	for i := range last {
		id := fmt.Sprint("w", i)
		h.create(id, value("K", "0"), value("L", strings.Repeat("l", 3000)))
		wg.Go(func() {
			for n := 1; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				u := set("K", fmt.Sprint(n))
				if n%3 == 0 {
					u.Delete = []string{"L"}
				} else {
					u.Set = append(u.Set, value("L", strings.Repeat("l", n%3000)))
				}
				if _, err := h.UpdateSecrets(ctx, in(id), u, request(fmt.Sprint(id, n), "f")); err != nil {
					t.Error(err)
					return
				}
				if got := h.values(id)["K"]; got != fmt.Sprint(n) {
					t.Errorf("%s is %s, was set to %d", id, got, n)
					return
				}
				last[i] = n
			}
		})
	}
	wg.Go(func() { // readers who see all or nothing
		for {
			select {
			case <-stop:
				return
			default:
			}
			if ws, _, err := h.ListWorkspaces("", 0, nil); err != nil || len(ws) != len(last) {
				t.Errorf("%d workspaces, %v", len(ws), err)
				return
			}
		}
	})
	var primary uint32
	for range 5 {
		primary = must(h.RotateKey(ctx, Options{}))(t).KeyID
		h.keptUp()
	}
	close(stop)
	wg.Wait()
	check := func() {
		t.Helper()
		for i, n := range last {
			if got := h.values(fmt.Sprint("w", i))["K"]; got != fmt.Sprint(n) || n == 0 {
				t.Errorf("w%d is %s, was set to %d", i, got, n)
			}
		}
		checkKeys(t, h, primary)
		checkNothingLeft(t, h, old)
	}
	check()
	h.reopen()
	check()
}

// Rotations that come while one goes on make further keys, up to a number.
func TestRotateKey_Overtakes(t *testing.T) {
	h := filledWith(t, 5, 20)
	steps := newManualUpkeep(h)
	first := h.keys().Primary
	for n := range seal.MaxKeys - 1 {
		r := must(h.RotateKey(ctx, Options{}))(t)
		if keys := h.keys(); keys.Primary != r.KeyID || len(keys.Records) != n+2 {
			t.Errorf("got %+v", keys)
		}
		if n == 2 { // everything is sealed anew, but the old ones are not yet retired
			steps.step(h)
		}
	}
	if _, err := h.RotateKey(ctx, Options{}); !errors.Is(err, ErrKeysInUse) {
		t.Errorf("got %v", err)
	}
	for steps.step(h) && h.keys().Rotating {
	}
	if keys := h.keys(); keys.Records[first] != 0 || len(keys.Records) != 1 || !keys.Compacting {
		t.Errorf("got %+v", keys)
	}
	steps.step(h) // the new file is begun
	last := must(h.RotateKey(ctx, Options{}))(t).KeyID
	if keys := h.keys(); !keys.Compacting || !keys.Rotating {
		t.Errorf("got %+v", keys)
	}
	for steps.step(h) {
	}
	checkKeys(t, h, last)
}

// Whatever is being done when the process is killed: all that was acknowledged is
// there, and the rotation is taken up.
func TestRotateKey_KilledAtEveryStep(t *testing.T) {
	h := filledWith(t, 30, 100)
	before := sealedOnes(t, h.db)
	truth := readAll(t, h)
	dir := filepath.Dir(h.cfg.Path)
	type moment struct {
		name  string
		files map[string][]byte
	}
	var moments []moment
	keep := func(name string) {
		m := moment{name, map[string][]byte{}}
		for _, entry := range must(os.ReadDir(dir))(t) {
			m.files[entry.Name()] = must(os.ReadFile(filepath.Join(dir, entry.Name())))(t)
		}
		moments = append(moments, m)
	}
	h.around = func(ctx context.Context, step string, do func(context.Context) error) error {
		keep("before " + step)
		err := do(ctx)
		keep("after " + step)
		return err
	}
	primary := must(h.RotateKey(ctx, Options{}))(t).KeyID
	h.keptUp()
	if len(moments) < 14 {
		t.Errorf("only %d moments", len(moments))
	}
	for i, m := range moments {
		t.Run(fmt.Sprintf("%d %s", i, m.name), func(t *testing.T) {
			dir := t.TempDir()
			for name, content := range m.files {
				if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			after := &harness{t: t, clock: h.clock, cfg: h.cfg, record: &recorder{}}
			after.cfg.Path = filepath.Join(dir, filepath.Base(h.cfg.Path))
			after.cfg.Around = nil
			after.open()
			defer after.close()
			if diff := diffTruth(truth, readAll(t, after)); diff != "" {
				t.Error(diff)
			}
			after.keptUp()
			if i == 0 { // the rotation has not happened
				return
			}
			checkKeys(t, after, primary)
			checkNothingLeft(t, after, before)
			if diff := diffTruth(truth, readAll(t, after)); diff != "" {
				t.Error(diff)
			}
			if entries := must(os.ReadDir(dir))(t); len(entries) != 2 {
				t.Errorf("files: %v", entries)
			}
		})
	}
}

// A step that fails is done again later, and nobody else has noticed.
func TestRotateKey_StepsFail(t *testing.T) {
	for _, step := range slices.Concat(Steps, upkeepSteps) {
		for _, moment := range fault.Moments {
			for _, action := range []fault.Action{fault.Error, fault.Panic} {
				t.Run(fmt.Sprint(moment, " ", step, " ", action), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						h := filledWith(t, 10, 100)
						truth := readAll(t, h)
						upkeep := newManualUpkeep(h)
						primary := must(h.RotateKey(ctx, Options{}))(t).KeyID
						injector := fault.New(fault.Rule{Step: step, Moment: moment, Action: action, Times: 1})
						h.around = injector.Around
						close(upkeep)
						time.Sleep(time.Hour) // the bubble's clock
						synctest.Wait()
						want := 2
						if step == stepRename && moment == fault.After {
							want = 1 // it is seen to be done
						}
						if n := injector.Passed()[fault.Point{Step: step, Moment: moment}]; n < want {
							t.Errorf("the step was done %d times", n)
						}
						checkKeys(t, h, primary)
						if diff := diffTruth(truth, readAll(t, h)); diff != "" {
							t.Error(diff)
						}
						must(h.UpdateSecrets(ctx, in("w01"), set("K", "new"), Options{}))(t)
						h.reopen()
						if h.values("w01")["K"] != "new" {
							t.Error("it is lost")
						}
						h.close()
					})
				})
			}
		}
	}
}

// kek is a KEK that fails as told.
type kek struct {
	*seal.Local
	err   error
	calls int
}

func (k *kek) Name() string { return "kek:test" }

func (k *kek) EncryptWithContext(ctx context.Context, plain, associated []byte) ([]byte, error) {
	k.calls++
	if k.err != nil {
		return nil, k.err
	}
	return k.Local.EncryptWithContext(ctx, plain, associated)
}

func (k *kek) DecryptWithContext(ctx context.Context, wrapped, associated []byte) ([]byte, error) {
	k.calls++
	if k.err != nil {
		return nil, k.err
	}
	return k.Local.DecryptWithContext(ctx, wrapped, associated)
}

// Without its KEK a store that runs goes on, a rotation is refused and changes
// nothing, one that has begun comes to its end, and a start is refused.
func TestKEK_IsDown(t *testing.T) {
	h := filledWith(t, 3, 10)
	k := &kek{Local: h.cfg.KEK.(*seal.Local)}
	h.cfg.FormerKEK = h.cfg.KEK
	h.cfg.KEK = k
	steps := newManualUpkeep(h)
	if keys := h.keys(); keys.KEK != "kek:test" || keys.Rotating {
		t.Errorf("got %+v", keys)
	}
	h.cfg.FormerKEK = nil
	h.reopen()
	r := must(h.RotateKey(ctx, request("rotate", "f")))(t)

	k.err = errors.New("connection refused")
	before := dump(t, h.db)
	for _, o := range []Options{{}, request("another", "f"), {ValidateOnly: true}} {
		if _, err := h.RotateKey(ctx, o); !errors.Is(err, ErrKEK) {
			t.Errorf("got %v", err)
		}
	}
	if diff := cmp.Diff(before, dump(t, h.db)); diff != "" {
		t.Error(diff)
	}
	if again := must(h.RotateKey(ctx, request("rotate", "f")))(t); again.KeyID != r.KeyID {
		t.Errorf("got %+v", again)
	}
	k.calls = 0
	must(h.UpdateSecrets(ctx, in("w00"), set("K", "2"), Options{}))(t)
	if h.values("w00")["K"] != "2" {
		t.Error("it was not set")
	}
	for steps.step(h) {
	}
	checkKeys(t, h, r.KeyID)
	if k.calls != 0 {
		t.Errorf("the KEK was asked %d times", k.calls)
	}
	h.close()

	refused(t, h.cfg, ErrKEK)
	if _, err := Open(h.cfg); err == nil || !strings.Contains(err.Error(), "which kek:test does not give: connection refused") {
		t.Errorf("got %v", err)
	}
	cfg := h.cfg
	cfg.Path += ".new"
	if _, err := Open(cfg); !errors.Is(err, ErrKEK) || !strings.Contains(err.Error(), "can't be made without a key, which kek:test does not give: connection refused") {
		t.Errorf("a new one: got %v", err)
	}
	if entries := must(os.ReadDir(filepath.Dir(h.cfg.Path)))(t); len(entries) != 2 {
		t.Errorf("files: %v", entries)
	}
	k.err = nil
	h.open()
	if h.values("w00")["K"] != "2" {
		t.Error("it is lost")
	}
}

// Another KEK takes over from a former one, which is of no use from then on.
func TestKEK_IsReplaced(t *testing.T) {
	h := filledWith(t, 3, 10)
	truth, former := readAll(t, h), h.cfg.KEK
	h.close()
	h.cfg.KEK = must(seal.LoadOrCreate(filepath.Join(t.TempDir(), "new")))(t)
	refused(t, h.cfg, ErrWrongKey)
	h.cfg.FormerKEK = must(seal.LoadOrCreate(filepath.Join(t.TempDir(), "another")))(t)
	refused(t, h.cfg, ErrWrongKey)
	h.cfg.FormerKEK = former
	h.open()
	primary := h.keys().Primary
	h.close()
	for _, cfg := range []Config{h.cfg, {Path: h.cfg.Path, KEK: h.cfg.KEK}} { // it may stay, or not
		h.cfg = cfg
		h.open()
		if diff := diffTruth(truth, readAll(t, h)); diff != "" {
			t.Error(diff)
		}
		checkKeys(t, h, primary) // nothing had to be sealed anew
		h.close()
	}
	h.cfg.KEK = former
	refused(t, h.cfg, ErrWrongKey)
}

// What a key file has sealed directly, in a database of an earlier version, is
// sealed anew with a data key, and the key file's key only wraps from then on.
func TestKEK_CarriesOver(t *testing.T) {
	for version := 1; version < keysVersion; version++ {
		t.Run(fmt.Sprint(version), func(t *testing.T) {
			file := must(os.ReadFile(fixture(version, "db")))(t)
			s := openFixture(t, version)
			h := &harness{Store: s, t: t, cfg: s.cfg}
			h.keptUp()
			direct := must(seal.Direct(h.cfg.KEK.(*seal.Local)))(t)
			primary := h.keys().Primary
			if primary == direct.Primary() {
				t.Error("the KEK seals")
			}
			checkKeys(t, h, primary)
			for place, sealed := range sealedOnes(t, h.db) {
				if bytes.Contains(file, []byte(sealed)) {
					t.Errorf("%s is as it was", place)
				}
			}
			// Nothing of what the key file opens is left.
			prefix := append([]byte{1}, byte(direct.Primary()>>24), byte(direct.Primary()>>16), byte(direct.Primary()>>8), byte(direct.Primary()))
			now := must(os.ReadFile(h.cfg.Path))(t)
			if n := bytes.Count(file, prefix); n < 5 {
				t.Errorf("the fixture has %d", n)
			}
			if n := bytes.Count(now, prefix); n > 1+1 { // what it has wrapped: the keys
				t.Errorf("%d times something of the key file's", n)
			}
			h.reopen()
			checkKeys(t, h, primary)
			if len(slices.Collect(maps.Keys(h.keys().Records))) != 1 {
				t.Errorf("got %+v", h.keys())
			}
			h.close()
			cfg := h.cfg
			cfg.KEK = &kek{Local: h.cfg.KEK.(*seal.Local)}
			if version == 1 { // a KEK that never sealed directly can't have
				if err := os.WriteFile(cfg.Path, file, 0o600); err != nil {
					t.Fatal(err)
				}
				refused(t, cfg, ErrWrongKey)
			}
		})
	}
}

// lateReader is a read transaction that has begun, and reads a secret of w00 when
// the gate is opened.
type lateReader struct {
	gate chan struct{}
	done chan struct{}
}

func (h *harness) readLate() lateReader {
	h.t.Helper()
	r, reading := lateReader{make(chan struct{}), make(chan struct{})}, make(chan struct{})
	go func() {
		defer close(r.done)
		err := h.view(func(tx *bolt.Tx) error {
			close(reading)
			<-r.gate
			w, err := getWorkspace(tx, "w00")
			if err != nil {
				return err
			}
			o := ownerOf(&w)
			x, err := openIndex(tx, h.sealer, o.name())
			if err != nil {
				return err
			}
			row, _ := o.get(tx, &x, "L")
			plain, err := o.open(tx, h.sealer, "L", &row)
			if err == nil && plain.Reveal() != "2" {
				h.t.Errorf("got %v", plain.Reveal())
			}
			return err
		})
		if err != nil {
			h.t.Error(err)
		}
	}()
	<-reading
	return r
}

// read has it read, and waits for its end.
func (r lateReader) read() {
	close(r.gate)
	<-r.done
}

// replacedFiles counts the files that are kept for readers.
func (h *harness) replacedFiles() int {
	h.t.Helper()
	time.Sleep(replacedRetry) // the bubble's clock
	synctest.Wait()
	if err := h.Ping(ctx); err != nil { // the writer has answered, and waits
		h.t.Fatal(err)
	}
	return len(h.replaced.files)
}

// Who reads while everything is sealed anew, the old key retired and the file
// replaced, reads what was there when it began, and holds up nobody.
func TestRotateKey_OldReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := filledWith(t, 3, 10)
		reader := h.readLate()
		var primary uint32
		for n := range 2 {
			primary = must(h.RotateKey(ctx, Options{}))(t).KeyID
			h.keptUp()
			if got := h.replacedFiles(); got != 1 {
				t.Errorf("rotation %d: %d files are kept for readers", n, got)
			}
			if h.values("w01")["L"] != "2" { // others read the new one meanwhile
				t.Error("got another value")
			}
			must(h.UpdateSecrets(ctx, in("w01"), set("NEW", fmt.Sprint(n)), Options{}))(t)
		}
		checkKeys(t, h, primary)
		reader.read()
		if got := h.replacedFiles(); got != 0 {
			t.Errorf("%d files are kept for readers", got)
		}
		h.close()
	})
}

// The end of the last reader of a file that was replaced takes no key from those of
// the next one, which another rotation is about to replace.
func TestRotateKey_OldReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := filledWith(t, 3, 10)
		upkeep := newManualUpkeep(h)
		first := h.readLate()
		must(h.RotateKey(ctx, Options{}))(t)
		for upkeep.step(h) {
		}
		second := h.readLate()
		primary := must(h.RotateKey(ctx, Options{}))(t).KeyID
		for h.keys().Rotating {
			upkeep.step(h)
		}
		first.read()
		if got := h.replacedFiles(); got != 0 {
			t.Errorf("%d files are kept for readers", got)
		}
		second.read()
		for upkeep.step(h) {
		}
		checkKeys(t, h, primary)
		h.close()
	})
}
