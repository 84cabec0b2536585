package server

import (
	"net"
	"sync"
	"sync/atomic"
)

// BoundedListener accepts so many connections at the same time, and of one address
// half as many, so that nobody keeps all others out. What is beyond that is closed
// at once: waiting in the kernel's queue it would be in the way of others.
type BoundedListener struct {
	net.Listener
	max     int
	refused atomic.Uint64

	mu        sync.Mutex
	total     int
	addresses map[string]int
}

// BoundConnections bounds the connections of l; max 0: there is no bound.
func BoundConnections(l net.Listener, maxConnections int) *BoundedListener {
	return &BoundedListener{Listener: l, max: maxConnections, addresses: make(map[string]int)}
}

// Refused counts the connections that were closed at once.
func (l *BoundedListener) Refused() uint64 { return l.refused.Load() }

// Accept implements net.Listener.
func (l *BoundedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil || l.max == 0 {
			return conn, err
		}
		address := "" // the other end of a unix socket has none
		if conn.RemoteAddr().Network() != "unix" {
			address = network(conn.RemoteAddr())
		}
		if l.enter(address) {
			return &boundedConn{Conn: conn, leave: sync.OnceFunc(func() { l.leave(address) })}, nil
		}
		l.refused.Add(1)
		_ = conn.Close() // it has not begun
	}
}

func (l *BoundedListener) enter(address string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= l.max || address != "" && l.addresses[address] >= max(1, l.max/2) {
		return false
	}
	l.total++
	l.addresses[address]++
	return true
}

func (l *BoundedListener) leave(address string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.addresses[address]--; l.addresses[address] == 0 {
		delete(l.addresses, address)
	}
}

// boundedConn gives its place to others when it is closed.
type boundedConn struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (c *boundedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// NetConn returns the connection that this one is about, for credentials that look
// at what it is.
func (c *boundedConn) NetConn() net.Conn { return c.Conn }
