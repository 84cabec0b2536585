package store

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
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
	for _, place := range []string{"meta/check", "meta/audit_key", "requests/id", "secrets/global/"} {
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
