package store

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	bolt "go.etcd.io/bbolt"
)

// Whatever bbolt writes is accepted: rows of all sizes that come and go one by
// one and by the thousand, in buckets that do as well. $WORKSPACED_TEST_COMMITS
// says after how many commits the test ends.
func TestCheckPages_AcceptsWhatBoltWrites(t *testing.T) {
	commits := 300
	if n, err := strconv.Atoi(os.Getenv("WORKSPACED_TEST_COMMITS")); err == nil {
		commits = n
	}
	path := filepath.Join(t.TempDir(), "db")
	db := must(bolt.Open(path, 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType, InitialMmapSize: mapSize}))(t)
	defer func() { _ = db.Close() }()
	db.NoSync = true
	db.AllocSize = growSize
	file := must(os.Open(path))(t)
	defer func() { _ = file.Close() }()

	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	for commit := range commits {
		// It grows for a while, then shrinks.
		grows := commit%60 < 40
		var held *bolt.Tx
		if random.IntN(4) == 0 { // a reader keeps pages from being used again
			held = must(db.Begin(false))(t)
		}
		err := db.Update(func(tx *bolt.Tx) error {
			for range 1 + random.IntN(3) {
				name := fmt.Appendf(nil, "bucket %d", random.IntN(4))
				if random.IntN(40) == 0 {
					if err := tx.DeleteBucket(name); err != nil && tx.Bucket(name) != nil {
						return err
					}
					continue
				}
				b, err := tx.CreateBucketIfNotExists(name)
				if err != nil {
					return err
				}
				if err := changeSome(random, b, grows); err != nil {
					return err
				}
			}
			return nil
		})
		if held != nil {
			err = errors.Join(err, held.Rollback())
		}
		if err != nil {
			t.Fatal(err)
		}
		info := must(file.Stat())(t)
		if torn, err := checkPages(file, info.Size()); err != nil || torn {
			t.Fatalf("seed %d, commit %d: torn is %t, %v", seed, commit, torn, err)
		}
	}
}

// changeSome puts and deletes rows, in the middle and at the ends.
func changeSome(random *rand.Rand, b *bolt.Bucket, grows bool) error {
	n := 1 << random.IntN(10)
	for range n {
		key := fmt.Appendf(nil, "%0*d", 1+random.IntN(20), random.IntN(5000))
		var err error
		switch r := random.IntN(10); {
		case r < 2, !grows && r < 8:
			c := b.Cursor()
			k, _ := c.Seek(key)
			if r == 0 {
				k, _ = c.First()
			}
			if k != nil {
				err = b.Delete(k)
			}
		default:
			size := random.IntN(200)
			if random.IntN(50) == 0 {
				size = random.IntN(20_000)
			}
			err = b.Put(key, make([]byte, size))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Damage that bbolt's own check does not see, or does not survive.
func TestCheckPages_Refuses(t *testing.T) {
	h := filled(t)
	good := h.closeAndRead()
	size := os.Getpagesize()
	page := func(b []byte, id int) []byte { return b[id*size : (id+1)*size] }
	find := func(flags uint16, also func(b []byte) bool) int {
		free := freePages(t, good)
		for id := 2; id < len(good)/size; id++ {
			if b := page(good, id); !free[id] && order.Uint64(b) == uint64(id) && order.Uint16(b[8:]) == flags && (also == nil || also(b)) {
				return id
			}
		}
		t.Fatalf("no page of kind %d", flags)
		return 0
	}
	several := func(b []byte) bool { return order.Uint16(b[10:]) > 1 }
	branch, leaf, list := find(branchPage, several), find(leafPage, several), find(freelistPage, nil)
	for name, damage := range map[string]func(b []byte){
		"a branch that is its own child": func(b []byte) { order.PutUint64(page(b, branch)[16+8:], uint64(branch)) },
		"a branch without end":           func(b []byte) { order.PutUint16(page(b, branch)[10:], 0xffff) },
		"an empty branch":                func(b []byte) { order.PutUint16(page(b, branch)[10:], 0) },
		"a child that is a meta page":    func(b []byte) { order.PutUint64(page(b, branch)[16+8:], 1) },
		"a child that is far away":       func(b []byte) { order.PutUint64(page(b, branch)[16+8:], 1<<60) },
		"a child that is the freelist":   func(b []byte) { order.PutUint64(page(b, branch)[16+8:], uint64(list)) },
		"a child under another name":     func(b []byte) { order.PutUint32(page(b, branch)[16+4:], 1) },
		"a leaf without end":             func(b []byte) { order.PutUint16(page(b, leaf)[10:], 0xffff) },
		"a row that is far away":         func(b []byte) { order.PutUint32(page(b, leaf)[16+4:], 1<<31) },
		"a row of endless size":          func(b []byte) { order.PutUint32(page(b, leaf)[16+12:], 0xffffffff) },
		"a row with no key":              func(b []byte) { order.PutUint32(page(b, leaf)[16+8:], 0) },
		"a page of endless length":       func(b []byte) { order.PutUint32(page(b, leaf)[12:], 0xffffffff) },
		"a freelist of endless length": func(b []byte) {
			order.PutUint16(page(b, list)[10:], 0xffff)
			order.PutUint64(page(b, list)[16:], 1<<40)
		},
		"a free page that is used":         func(b []byte) { order.PutUint64(page(b, list)[16:], uint64(leaf)) },
		"a free page that is far away":     func(b []byte) { order.PutUint64(page(b, list)[16:], 1<<60) },
		"a free page that is forgotten":    func(b []byte) { order.PutUint16(page(b, list)[10:], order.Uint16(page(b, list)[10:])-1) },
		"a page that says it is another":   func(b []byte) { order.PutUint64(page(b, leaf), uint64(leaf+1)) },
		"a page of no kind":                func(b []byte) { order.PutUint16(page(b, leaf)[8:], 0x20) },
		"a leaf whose kind is branch":      func(b []byte) { order.PutUint16(page(b, leaf)[8:], branchPage) },
		"the first two keys change places": func(b []byte) { swapElements(page(b, leaf)) },
	} {
		t.Run(name, func(t *testing.T) {
			bad := append([]byte(nil), good...)
			damage(bad)
			cfg := h.cfg
			cfg.Path = filepath.Join(t.TempDir(), "workspaced.db")
			if err := os.WriteFile(cfg.Path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			refused(t, cfg, ErrDamaged)
			file := must(os.Open(cfg.Path))(t)
			defer func() { _ = file.Close() }()
			if _, err := checkPages(file, int64(len(bad))); err == nil {
				t.Error("bbolt had to find it")
			}
		})
	}
}

// swapElements swaps a leaf's first two rows, which stay where they are.
func swapElements(page []byte) {
	var first, second [elementSize]byte
	copy(first[:], page[16:])
	copy(second[:], page[32:])
	order.PutUint32(first[4:], order.Uint32(first[4:])-elementSize)
	order.PutUint32(second[4:], order.Uint32(second[4:])+elementSize)
	copy(page[16:], second[:])
	copy(page[32:], first[:])
}
