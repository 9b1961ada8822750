package api

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// ListenConfig says where the API listens.
type ListenConfig struct {
	// Address is unix:/path or host:port.
	Address string
	// CertFile and KeyFile are PEM files. Without them a host must be loopback.
	CertFile, KeyFile string
}

// Listen opens the listener of an API. A unix socket is readable and writable by its owner only, from its first instant; one
// that a dead process left behind is replaced, one that a live process answers on is not. The lock file beside it stays.
func Listen(c ListenConfig) (net.Listener, error) {
	l, err := listen(c)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", c.Address, err)
	}
	return l, nil
}

func listen(c ListenConfig) (net.Listener, error) {
	if path, ok := strings.CutPrefix(c.Address, "unix:"); ok {
		return listenUnix(path)
	}
	host, _, err := net.SplitHostPort(c.Address)
	if err != nil {
		return nil, errors.New("want unix:/path or host:port")
	}
	var secure *tls.Config
	switch {
	case c.CertFile != "" || c.KeyFile != "":
		cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("load certificate: %w", err)
		}
		secure = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	case !isLoopback(host):
		return nil, errors.New("it is not loopback, and tokens would cross the network in the clear: give it a certificate and a key, or listen on 127.0.0.1 or a unix socket")
	}
	l, err := net.Listen("tcp", c.Address)
	if err != nil {
		return nil, err
	}
	if secure != nil {
		return tls.NewListener(l, secure), nil
	}
	if a, ok := l.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() { // localhost may be anything
		_ = l.Close()
		return nil, fmt.Errorf("%s is %s, which is not loopback", host, l.Addr())
	}
	return l, nil
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// unixListener removes its socket when it is closed, and then lets go of the lock.
type unixListener struct {
	*net.UnixListener
	path string
	lock *os.File
}

func (l *unixListener) Close() error {
	err := l.UnixListener.Close()
	if err == nil { // only the first time: later the path may be another's
		_ = os.Remove(l.path)
	}
	return errors.Join(err, l.lock.Close())
}

func listenUnix(path string) (_ net.Listener, err error) {
	lock, err := lockSocket(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = lock.Close()
		}
	}()
	switch info, err := os.Lstat(path); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode()&os.ModeSocket == 0:
		return nil, errors.New("there is a file of that name that is not a socket: remove it, or choose another path")
	default:
		if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
			_ = conn.Close()
			return nil, errors.New("another process answers there: stop it, or choose another path")
		}
	}
	// Made under another name and renamed once it is closed to others: there is no instant at which they could connect.
	fresh := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(fresh, 0o600), os.Rename(fresh, path)); err != nil {
		_ = l.Close()
		_ = os.Remove(fresh)
		return nil, err
	}
	return &unixListener{l, path, lock}, nil
}

// lockSocket keeps two servers that start at once from replacing each other's socket.
func lockSocket(path string) (*os.File, error) {
	f, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errors.New("another server listens there: stop it, or choose another path")
		}
		return nil, fmt.Errorf("lock %s.lock: %w", path, err)
	}
	return f, nil
}
