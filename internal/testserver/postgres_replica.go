//go:build unix

package testserver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Replica starts a physical standby that streams from p. It restarts p to copy its data, so sessions end. The caller must Stop the
// replica; its superuser is p's.
func (p *Postgres) Replica() (*Postgres, error) {
	r := &Postgres{
		Host: p.Host, User: p.User, Password: p.Password, Database: p.Database, CAFile: p.CAFile,
		cfg: p.cfg, bin: p.bin, uid: p.uid, gid: p.gid,
	}
	var err error
	if r.dir, err = os.MkdirTemp("", "rekey-pg"); err != nil {
		return nil, err
	}
	r.SocketDir, r.LogFile = r.dir, filepath.Join(r.dir, "server.log")
	if err := r.follow(p); err != nil {
		_ = r.Stop()
		return nil, fmt.Errorf("start a replica: %w", err)
	}
	return r, nil
}

// follow copies p's data and starts on the copy.
func (r *Postgres) follow(p *Postgres) error {
	if err := p.Halt(); err != nil {
		return err
	}
	if err := os.CopyFS(r.data(), os.DirFS(p.data())); err != nil {
		return errors.Join(err, p.Start())
	}
	if err := p.Start(); err != nil {
		return err
	}
	quote := strings.NewReplacer("'", "''")
	conninfo := fmt.Sprintf("host=%s port=%d user=%s password=%s", p.Host, p.Port, p.User, p.Password)
	if err := errors.Join(
		r.write(r.LogFile, nil),
		r.write(filepath.Join(r.data(), "standby.signal"), nil),
		r.add(filepath.Join(r.data(), "postgresql.conf"), []string{"hot_standby = on", "primary_conninfo = '" + quote.Replace(conninfo) + "'"}),
	); err != nil {
		return err
	}
	err := filepath.WalkDir(r.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			err = os.Chmod(path, 0o700) //nolint:gosec // a folder, and the server insists on this
		}
		if r.uid >= 0 {
			err = errors.Join(err, os.Chown(path, r.uid, r.gid))
		}
		return err
	})
	if err != nil {
		return err
	}
	if r.Port, err = freePort(); err != nil {
		return err
	}
	return r.Start()
}
