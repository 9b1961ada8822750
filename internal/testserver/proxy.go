package testserver

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
)

// Proxy is a TCP relay to a server, in which a test can lose what is on its way. It reads along, so the connection must be
// plaintext, and what it looks for must fit one packet, as a short statement does.
type Proxy struct {
	Host string // 127.0.0.1
	Port int

	listener net.Listener
	target   string
	wg       sync.WaitGroup

	mu     sync.Mutex
	down   bool
	plan   *loss
	watch  func(client net.Addr, request []byte) <-chan struct{}
	conns  map[net.Conn]bool
	closed chan struct{}
}

// loss is what to do with the next request that holds the text.
type loss struct {
	text   []byte
	reply  bool   // forward it, wait for the answer and lose that
	answer []byte // what the answer holds when it is complete; empty: anything
}

// NewProxy relays a free loopback port to host:port until Close.
func NewProxy(host string, port int) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{
		Host: "127.0.0.1", Port: l.Addr().(*net.TCPAddr).Port, listener: l,
		target: net.JoinHostPort(host, strconv.Itoa(port)), conns: map[net.Conn]bool{}, closed: make(chan struct{}),
	}
	p.wg.Go(p.accept)
	return p, nil
}

// Cut ends every connection and refuses new ones until Mend.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = true
	for c := range p.conns {
		_ = c.Close()
	}
}

// Mend undoes Cut.
func (p *Proxy) Mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = false
}

// LoseRequest ends the connection on which the next request with this text arrives, without forwarding it.
func (p *Proxy) LoseRequest(text string) { p.set(&loss{text: []byte(text)}) }

// LoseReply forwards the next request with this text, waits until the server's answer holds answer, and ends the connection
// instead of relaying it.
func (p *Proxy) LoseReply(text, answer string) {
	p.set(&loss{text: []byte(text), reply: true, answer: []byte(answer)})
}

func (p *Proxy) set(l *loss) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.plan = l
}

// Watch calls fn with everything that a client sends, before it is forwarded. If fn returns a channel, that and what comes behind it on
// the connection waits until the channel is closed. fn is called from several goroutines; nil ends the watching.
func (p *Proxy) Watch(fn func(client net.Addr, request []byte) (hold <-chan struct{})) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watch = fn
}

// hold asks the watcher, and waits as long as that wants.
func (p *Proxy) hold(client net.Addr, request []byte) {
	p.mu.Lock()
	watch := p.watch
	p.mu.Unlock()
	if watch == nil || len(request) == 0 {
		return
	}
	if wait := watch(client, request); wait != nil {
		select {
		case <-wait:
		case <-p.closed:
		}
	}
}

// Pending reports whether the planned loss has not happened yet.
func (p *Proxy) Pending() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.plan != nil
}

// Close ends everything. It may be called once.
func (p *Proxy) Close() {
	_ = p.listener.Close()
	close(p.closed)
	p.Cut()
	p.wg.Wait()
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.relay(client) })
	}
}

// keep registers a connection, unless the relay is cut.
func (p *Proxy) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.down {
		_ = c.Close()
		return false
	}
	p.conns[c] = true
	return true
}

func (p *Proxy) drop(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	_ = c.Close()
}

func (p *Proxy) relay(client net.Conn) {
	if !p.keep(client) {
		return
	}
	defer p.drop(client)
	server, err := net.Dial("tcp", p.target)
	if err != nil || !p.keep(server) {
		return
	}
	defer p.drop(server)

	lost := make(chan []byte, 1) // the server's next words, up to this, are not for the client
	ended := make(chan struct{})
	p.wg.Go(func() {
		defer close(ended)
		buf := make([]byte, 64<<10)
		for {
			n, err := server.Read(buf)
			select {
			case answer := <-lost:
				for held := bytes.Clone(buf[:n]); err == nil && !bytes.Contains(held, answer); held = append(held, buf[:n]...) {
					n, err = server.Read(buf)
				}
				_ = client.Close()
				return
			default:
			}
			if n > 0 {
				if _, err := client.Write(buf[:n]); err != nil {
					_ = server.Close()
					return
				}
			}
			if err != nil {
				_ = client.Close()
				return
			}
		}
	})
	buf := make([]byte, 64<<10)
	for {
		n, err := client.Read(buf)
		p.hold(client.RemoteAddr(), buf[:n])
		if l := p.match(buf[:n]); l != nil {
			if !l.reply {
				return
			}
			lost <- l.answer
			_, _ = server.Write(buf[:n])
			<-ended
			return
		}
		if n > 0 {
			if _, err := server.Write(buf[:n]); err != nil {
				return
			}
		}
		if errors.Is(err, io.EOF) {
			_ = server.(*net.TCPConn).CloseWrite()
			<-ended
			return
		}
		if err != nil {
			return
		}
	}
}

// match takes the planned loss if b is what it waits for.
func (p *Proxy) match(b []byte) *loss {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := p.plan; l != nil && len(b) > 0 && bytes.Contains(b, l.text) {
		p.plan = nil
		return l
	}
	return nil
}
