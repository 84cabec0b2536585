package store

import (
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// What was refused, or changed nothing, waits here for the writer: nobody waits
// for it, and a flood of it takes neither memory nor commits without bound, and is
// counted all the same. Calls that are alike are one entry with a count. When there
// are too many that are not, entries say less, so that more are alike, in steps:
// first not about what, then not by whom. What is left then are the methods and
// codes that there are.

const (
	// auditWindow is how long an entry waits for others like it. A crash loses what
	// came within it, and what waits for the pace.
	auditWindow = 5 * time.Second
	// auditRetry is how long it waits after a commit that has failed.
	auditRetry = 10 * time.Second
	// auditPace is how much time there is between entries in the long run, and
	// auditBurst how many may come at once. Who is refused pays nothing for it, and
	// the log has an end: without these he could push all others' entries out of it
	// within hours.
	auditPace  = 20 * time.Second
	auditBurst = 2000
	// auditHold is how long entries wait at most for the pace. Then they say less.
	auditHold = 10 * time.Minute
)

// How many entries wait at most before they say less: of known subjects and of
// nobody, whom it costs nothing to be many.
var auditRoom = []struct{ known, nobody int }{{256, 64}, {512, 128}}

// auditor is what the store keeps of the audit log in memory.
type auditor struct {
	key     []byte // of the MAC
	copied  atomic.Uint64
	written chan struct{} // size 1

	mu     sync.Mutex
	queue  []*AuditEntry
	kinds  map[auditKind]*AuditEntry // where each is
	nobody int                       // of them are without subject
	queued chan struct{}             // size 1: the queue is no longer empty

	// The writer's.
	budget budget
	taken  int // by the last take
}

// budget is how many entries the queue may write.
type budget struct {
	spent float64   // of auditBurst, as of at
	at    time.Time // the last time that it was looked at
	held  time.Time // since when entries wait for it; zero: none do
}

// left returns how many there are.
func (b *budget) left(now time.Time) int {
	b.spent = max(0, b.spent-now.Sub(b.at).Seconds()/auditPace.Seconds())
	b.at = now
	return max(0, auditBurst-int(math.Ceil(b.spent)))
}

// wait returns how long n entries have to wait; 0: not, or no longer.
func (b *budget) wait(n int, now time.Time) time.Duration {
	missing := n - b.left(now)
	if missing <= 0 {
		return 0
	}
	if b.held.IsZero() {
		b.held = now
	}
	return max(0, min(time.Duration(missing)*auditPace, b.held.Add(auditHold).Sub(now)))
}

// spend notes that n were written.
func (b *budget) spend(n int) { b.spent, b.held = b.spent+float64(n), time.Time{} }

func (a *auditor) init() {
	a.kinds = make(map[auditKind]*AuditEntry)
	a.queued, a.written = make(chan struct{}, 1), make(chan struct{}, 1)
}

// auditKind is what calls have in common that share an entry.
type auditKind struct {
	subject, peer, method, resource, code, reason string
	effect                                        AuditEffect
	generation                                    int64
}

func kindOf(e *AuditEntry) auditKind {
	host, _, err := net.SplitHostPort(e.Peer)
	if err != nil {
		host = e.Peer
	}
	return auditKind{e.Subject, host, e.Method, e.Resource, e.Code, e.Reason, e.Effect, e.Generation}
}

// AuditLater has an entry written within some seconds, together with others like
// it. It never waits, and the entry is lost only if the process ends before that,
// other than by Close.
func (s *Store) AuditLater(e AuditEntry) {
	if e.Time.IsZero() {
		e.Time = s.cfg.Now().UTC().Round(0)
	}
	s.audit.add(e)
}

func (a *auditor) add(e AuditEntry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for step := 0; ; step++ {
		kind := kindOf(&e)
		if first := a.kinds[kind]; first != nil {
			first.Count, first.LastTime = first.Calls()+e.Calls(), latest(first, &e)
			if e.Time.Before(first.Time) {
				first.Time = e.Time
			}
			return
		}
		if step == len(auditRoom) || a.hasRoom(step, &e) {
			a.queue, a.kinds[kind] = append(a.queue, &e), &e
			if e.Subject == "" {
				a.nobody++
			}
			break
		}
		e.sayLess(step)
	}
	select {
	case a.queued <- struct{}{}:
	default:
	}
}

// sayLess makes an entry one of more that are alike.
func (e *AuditEntry) sayLess(step int) {
	e.Resource, e.Keys, e.Generation, e.RequestID, e.CallID = "", nil, 0, "", ""
	if step > 0 {
		e.Subject, e.Peer = "", ""
	}
}

// condense has the entries say less until there are no more than n, or they can't.
func (a *auditor) condense(n int) {
	for step := range auditRoom {
		if a.len() <= n {
			return
		}
		for _, e := range a.take() {
			e.sayLess(step)
			a.add(e)
		}
	}
}

func (a *auditor) len() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.queue)
}

func (a *auditor) hasRoom(step int, e *AuditEntry) bool {
	if e.Subject == "" && a.nobody >= auditRoom[step].nobody {
		return false
	}
	return len(a.queue) < auditRoom[step].known
}

// latest is the later of two entries' last times.
func latest(a, b *AuditEntry) time.Time {
	t := a.Time
	for _, other := range []time.Time{a.LastTime, b.Time, b.LastTime} {
		if other.After(t) {
			t = other
		}
	}
	return t
}

// take empties the queue. Those that came first come first.
func (a *auditor) take() []AuditEntry {
	a.mu.Lock()
	defer a.mu.Unlock()
	entries := make([]AuditEntry, 0, len(a.queue))
	for _, e := range a.queue {
		entries = append(entries, *e)
	}
	a.queue, a.nobody, a.taken = nil, 0, len(entries)
	clear(a.kinds)
	return entries
}

// giveBack is for what was taken and not written.
func (a *auditor) giveBack(entries []AuditEntry) {
	for _, e := range entries {
		a.add(e)
	}
}

// wrote tells the reader of AuditWritten.
func (a *auditor) wrote() {
	select {
	case a.written <- struct{}{}:
	default:
	}
}

// flushAudit writes the queue, if there is budget for it or it is the last time. It is
// the writer's, and returns when to do it next; nil: when something is queued.
func (s *Store) flushAudit(last bool) (next <-chan time.Time) {
	n, now := s.audit.len(), time.Now()
	if n == 0 {
		return nil
	}
	if !last {
		if wait := s.audit.budget.wait(n, now); wait > 0 {
			return time.After(wait)
		}
		s.audit.condense(s.audit.budget.left(now))
	}
	err := s.makeReady()
	if err == nil {
		err = s.commitOwn(func(t *txn) error {
			t.flush = true
			return nil
		})
	}
	if err != nil {
		s.cfg.Logger.Warn("refused calls are not in the audit log yet", "error", translate(err), "next_try", auditRetry)
		return time.After(auditRetry)
	}
	s.audit.budget.spend(s.audit.taken)
	return nil
}

// saveCopied writes up to where the log was copied, so that nothing is copied
// twice. It is the writer's last word.
func (s *Store) saveCopied() {
	if s.audit.copied.Load() == 0 || s.makeReady() != nil {
		return
	}
	_ = s.commitOwn(func(t *txn) error { // if it fails the next start copies some entries again
		st, _, damage := t.auditState()
		if damage != "" || st.Copied == s.audit.copied.Load() {
			return nil
		}
		return t.putAuditState(st)
	})
}
