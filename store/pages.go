package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"sync/atomic"
)

// bbolt trusts its pages: a damaged one can make it recurse without end, ask for
// more memory than there is, or read beyond the file, and not all of that can be
// recovered from. So checkPages looks at the file before bbolt does.

// How bbolt lays out its file; numbers are in the machine's byte order.
const (
	boltMagic        = 0xED0CDAED
	boltVersion      = 2
	pageHeaderSize   = 16 // id 8, flags 2, count 2, overflow 4
	metaSize         = 64 // magic, version, page size, flags: 4 each; root, sequence, freelist, high, txid, checksum: 8 each
	bucketHeaderSize = 16 // root, sequence: 8 each
	elementSize      = 16 // of a branch: pos 4, ksize 4, pgid 8; of a leaf: flags, pos, ksize, vsize: 4 each
	bucketFlag       = 0x01
	manyFree         = 0xFFFF // the count stands before the list
	noFreelist       = ^uint64(0)
	minPageSize      = 1 << 10
	maxPageSize      = 16 << 20
)

// Flags of pages.
const (
	branchPage   = 0x01
	leafPage     = 0x02
	metaPage     = 0x04
	freelistPage = 0x10
)

var order = binary.NativeEndian

// pages is a file that is being checked.
type pages struct {
	file     io.ReaderAt
	size     int64
	pageSize int64
	high     uint64        // the first page behind the last one that is used
	seen     []atomic.Bool // by page: it has a place in a tree or in the freelist
}

// page is a page and what overflows it.
type page struct {
	id    uint64
	flags uint16
	count int
	data  []byte
}

// checkPages returns an error that says what is wrong with a file of this size:
// each page is whole, has one place, and its keys are in order. One of the two
// meta pages may be torn, as by a power failure during a commit; then that commit
// is missing.
func checkPages(file io.ReaderAt, size int64) (torn bool, err error) {
	p := &pages{file: file, size: size}
	m, torn, err := p.meta()
	if err != nil {
		return false, err
	}
	if there := uint64(size / p.pageSize); m.high < 4 || m.high > there {
		return false, fmt.Errorf("%d of %d pages are there", there, m.high)
	}
	p.high = m.high
	p.seen = make([]atomic.Bool, p.high)
	p.seen[0].Store(true)
	p.seen[1].Store(true)
	if err := p.freelist(m.freelist); err != nil {
		return false, err
	}
	if err := p.buckets(m.root); err != nil {
		return false, err
	}
	for id := range p.seen {
		if !p.seen[id].Load() {
			return false, fmt.Errorf("page %d is neither used nor free", id)
		}
	}
	return torn, nil
}

// boltMeta is what a meta page says.
type boltMeta struct {
	pageSize                   int64
	root, freelist, high, txid uint64
}

// parseMeta reads a meta page; known: it is one, though its checksum may be wrong.
func parseMeta(b []byte) (m boltMeta, known, valid bool) {
	id, flags, b := order.Uint64(b), order.Uint16(b[8:]), b[pageHeaderSize:]
	known = id < 2 && flags == metaPage && order.Uint32(b) == boltMagic && order.Uint32(b[4:]) == boltVersion
	sum := fnv.New64a()
	_, _ = sum.Write(b[:metaSize-8])
	return boltMeta{
		pageSize: int64(order.Uint32(b[8:])),
		root:     order.Uint64(b[16:]),
		freelist: order.Uint64(b[32:]),
		high:     order.Uint64(b[40:]),
		txid:     order.Uint64(b[48:]),
	}, known, known && order.Uint64(b[metaSize-8:]) == sum.Sum64()
}

// meta returns the newest valid meta page, and learns the size of a page.
func (p *pages) meta() (newest boltMeta, torn bool, err error) {
	at := func(offset int64) (m boltMeta, known, valid bool) {
		b := make([]byte, pageHeaderSize+metaSize)
		if _, err := p.file.ReadAt(b, offset); err != nil {
			return m, false, false
		}
		return parseMeta(b)
	}
	if m, _, valid := at(0); valid {
		p.pageSize = m.pageSize
	}
	for size := int64(minPageSize); size <= maxPageSize && p.pageSize == 0; size *= 2 {
		if m, _, valid := at(size); valid && m.pageSize == size {
			p.pageSize = size
		}
	}
	if p.pageSize < minPageSize || p.pageSize > maxPageSize || p.pageSize&(p.pageSize-1) != 0 {
		return newest, false, errors.New("it has no valid meta page")
	}
	for i := range int64(2) {
		m, known, valid := at(i * p.pageSize)
		switch {
		case !known || valid && (m.pageSize != p.pageSize || m.txid%2 != uint64(i)):
			return newest, false, fmt.Errorf("page %d is no meta page", i)
		case !valid:
			torn = true
		case m.txid >= newest.txid:
			newest = m
		}
	}
	return newest, torn, nil
}

// read returns a page, which must not have been read before.
func (p *pages) read(id uint64) (page, error) {
	if id < 2 || id >= p.high {
		return page{}, fmt.Errorf("page %d is out of range", id)
	}
	b := make([]byte, p.pageSize)
	if _, err := p.file.ReadAt(b, int64(id)*p.pageSize); err != nil {
		return page{}, err
	}
	if got := order.Uint64(b); got != id {
		return page{}, fmt.Errorf("page %d says that it is page %d", id, got)
	}
	overflow := uint64(order.Uint32(b[12:]))
	if overflow >= p.high-id {
		return page{}, fmt.Errorf("page %d is too long", id)
	}
	for i := id; i <= id+overflow; i++ {
		if err := p.take(i); err != nil {
			return page{}, err
		}
	}
	if overflow > 0 {
		b = make([]byte, int64(overflow+1)*p.pageSize)
		if _, err := p.file.ReadAt(b, int64(id)*p.pageSize); err != nil {
			return page{}, err
		}
	}
	return parsePage(id, b), nil
}

func parsePage(id uint64, b []byte) page {
	return page{id: id, flags: order.Uint16(b[8:]), count: int(order.Uint16(b[10:])), data: b}
}

// take gives a page its place.
func (p *pages) take(id uint64) error {
	if p.seen[id].Swap(true) {
		return fmt.Errorf("page %d is in two places", id)
	}
	return nil
}

func (p *pages) freelist(id uint64) error {
	if id == noFreelist {
		return errors.New("it has no freelist")
	}
	pg, err := p.read(id)
	if err != nil {
		return err
	}
	if pg.flags != freelistPage {
		return fmt.Errorf("page %d is no freelist", id)
	}
	list, count := pg.data[pageHeaderSize:], uint64(pg.count)
	if count == manyFree {
		count, list = order.Uint64(list), list[8:]
	}
	if count > uint64(len(list)/8) {
		return fmt.Errorf("page %d has no room for %d free pages", id, count)
	}
	for i := range count {
		free := order.Uint64(list[8*i:])
		if free < 2 || free >= p.high {
			return fmt.Errorf("free page %d is out of range", free)
		}
		if err := p.take(free); err != nil {
			return err
		}
	}
	return nil
}

// keyRange is where a page's keys have to be: the first one is that by which the
// page above names it, and all are before end; nil: there is none. Were the first
// one another, bbolt would not find the page above when it has to write it.
type keyRange struct{ first, end []byte }

// entry is what a leaf has: a row, or a bucket.
type entry struct {
	flags      uint32
	key, value []byte
}

// tree checks the page and all below it, and calls f with what is in its leaves.
func (p *pages) tree(id uint64, keys keyRange, f func(entry) error) error {
	pg, err := p.read(id)
	if err != nil {
		return err
	}
	switch pg.flags {
	case leafPage:
		return pg.leaf(keys, f)
	case branchPage:
	default:
		return fmt.Errorf("page %d is of an unknown kind", id)
	}
	if pg.count == 0 {
		return pg.empty()
	}
	var last []byte
	for i := range pg.count {
		key, err := pg.branchKey(i)
		if err != nil {
			return err
		}
		if err := keys.check(pg.id, last, key); err != nil {
			return err
		}
		last = key
		below := keyRange{first: key, end: keys.end}
		if i+1 < pg.count {
			if below.end, err = pg.branchKey(i + 1); err != nil {
				return err
			}
		}
		if err := p.tree(order.Uint64(pg.element(i)[8:]), below, f); err != nil {
			return err
		}
	}
	return nil
}

// buckets checks the root and its buckets, those at the same time.
func (p *pages) buckets(root uint64) error {
	var waits []func() error
	err := guard(func() error { // also after a panic those are waited for
		return p.tree(root, keyRange{}, func(e entry) error {
			waits = append(waits, parallel(func() error { return p.bucket(e) }))
			return nil
		})
	})
	for _, wait := range waits {
		err = cmp.Or(err, wait())
	}
	return err
}

// bucket checks a bucket of the root: there are none below those.
func (p *pages) bucket(e entry) error {
	if e.flags != bucketFlag || len(e.value) < bucketHeaderSize {
		return fmt.Errorf("%.64q is no bucket", e.key)
	}
	row := func(r entry) error {
		if r.flags != 0 {
			return fmt.Errorf("row %.64q in %s is of an unknown kind", r.key, e.key)
		}
		return nil
	}
	if root := order.Uint64(e.value); root != 0 {
		return p.tree(root, keyRange{}, row)
	}
	inline := e.value[bucketHeaderSize:] // a small one's only page
	if len(inline) < pageHeaderSize {
		return fmt.Errorf("bucket %.64q is cut off", e.key)
	}
	pg := parsePage(0, inline)
	if pg.flags != leafPage {
		return fmt.Errorf("bucket %.64q is of an unknown kind", e.key)
	}
	return pg.leaf(keyRange{}, row)
}

func (pg *page) leaf(keys keyRange, f func(entry) error) error {
	var last []byte
	if pg.count == 0 && keys.first != nil {
		return pg.empty()
	}
	for i := range pg.count {
		el := pg.element(i)
		if el == nil {
			return pg.cutOff()
		}
		key, value, ok := pg.slices(i, order.Uint32(el[4:]), order.Uint32(el[8:]), order.Uint32(el[12:]))
		if !ok {
			return pg.cutOff()
		}
		if err := keys.check(pg.id, last, key); err != nil {
			return err
		}
		last = key
		if err := f(entry{flags: order.Uint32(el), key: key, value: value}); err != nil {
			return err
		}
	}
	return nil
}

func (pg *page) branchKey(i int) ([]byte, error) {
	el := pg.element(i)
	if el == nil {
		return nil, pg.cutOff()
	}
	key, _, ok := pg.slices(i, order.Uint32(el), order.Uint32(el[4:]), 0)
	if !ok {
		return nil, pg.cutOff()
	}
	return key, nil
}

// element returns the header of an element, or nil.
func (pg *page) element(i int) []byte {
	begin := pageHeaderSize + i*elementSize
	if begin+elementSize > len(pg.data) {
		return nil
	}
	return pg.data[begin : begin+elementSize]
}

// slices returns an element's key and value, which stand pos behind its header.
func (pg *page) slices(i int, pos, keySize, valueSize uint32) (key, value []byte, ok bool) {
	begin := int64(pageHeaderSize+i*elementSize) + int64(pos)
	middle := begin + int64(keySize)
	end := middle + int64(valueSize)
	if end > int64(len(pg.data)) {
		return nil, nil, false
	}
	return pg.data[begin:middle], pg.data[middle:end], true
}

func (pg *page) empty() error { return fmt.Errorf("page %d is empty", pg.id) }

func (pg *page) cutOff() error { return fmt.Errorf("page %d is cut off", pg.id) }

// check checks a key of a page, and that it comes after the last one.
func (r *keyRange) check(id uint64, last, key []byte) error {
	switch {
	case len(key) == 0,
		last == nil && r.first != nil && !bytes.Equal(r.first, key),
		last != nil && bytes.Compare(last, key) >= 0,
		r.end != nil && bytes.Compare(key, r.end) >= 0:
		return fmt.Errorf("the keys of page %d are not in order", id)
	}
	return nil
}
